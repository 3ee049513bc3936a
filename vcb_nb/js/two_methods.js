// Two methods trained side by side on one prompt, live: policies, KL, reward, gaps against gaps.
VCBX.twoMethods = (() => {
  const { math } = VCBX;

  // The method's own hyper-parameter at the common strength gamma, as in vcb_nb/widgets.py.
  const alike = (method, param, gamma) => method === "ipo" ? gamma / 2
    : ["delta", "rank_weight"].includes(param) ? 1 / gamma : gamma;

  // The path of `steps` steps of Adam from the SFT policy; sigma is exact under that policy.
  const train = (method, param, gamma, ref, rewards, options) => {
    const sigma = math.rewardStd(ref, rewards);
    const params = { [param]: alike(method, param, gamma), ...(sigma > 0 && { sigma }) };
    return math.train(method, ref, rewards, params, options);
  };

  // What the objective at this strength asks for; the SFT policy where no reward differs.
  const target = (gamma, ref, rewards) =>
    math.ordered(rewards).length ? math.optimum(ref, rewards, gamma) : ref;

  const measure = (logps, goal, ref, rewards) => ({
    kl: math.kl(logps, ref), reward: math.expected(logps, rewards), off: math.kl(logps, goal),
  });

  // Of every pair, the better response first: reward gap in sigmas, log-ratio gap in nats.
  const gaps = (logps, ref, rewards) => {
    const l = math.ratios(logps, ref), sigma = math.rewardStd(ref, rewards);
    return math.ordered(rewards).map(([w, o]) =>
      ({ asked: (rewards[w] - rewards[o]) / sigma, got: l[w] - l[o] }));
  };

  return { alike, train, target, measure, gaps };
})();

VCBX.register("two_methods", (root, config) => {
  const { math, ui } = VCBX, { alike, train, target, measure, gaps } = VCBX.twoMethods;
  const { svg, set, round } = ui, NAMES = [..."ABCDEF"], STEPS = config.steps, SLOTS = [0, 1];
  const MOST = NAMES.length, PAIRS = MOST * (MOST - 1) / 2;
  const begin = () => ({ methods: [...config.start], gammas: [config.gamma, config.gamma],
                         rewards: [...config.rewards], n: config.n, step: config.training });
  let state = begin();
  const style = k => config.methods[state.methods[k]];
  const own = k => config.strengths[state.methods[k]];
  const rewards = () => state.rewards.slice(0, state.n);
  const reference = () => math.logSoftmax(config.probs.slice(0, state.n).map(Math.log));
  const redraw = ui.schedule(() => draw());

  // ---- training: a path per method, kept until its inputs change ----
  const cache = [{}, {}];
  const path = k => {
    const inputs = [state.methods[k], own(k).param, state.gammas[k], reference(), rewards()];
    const key = inputs.join(";");
    if (cache[k].key !== key)
      cache[k] = { key, path: train(...inputs, { steps: STEPS, lr: config.lr }) };
    return cache[k].path;
  };

  // ---- the rewards, draggable ----
  const H = 268, bottom = H - 46, panels = ui.row(root);
  const yReward = ui.scale(0, 1, bottom, 44);
  const left = ui.panel(panels, { width: 180, height: H, max: 1.35,
                                  label: "Rewards of the responses, to drag" });
  left.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "Rewards (drag)" }));
  ui.axis(left, { side: "left", at: 40, scale: yReward, label: "reward r", grid: 176, dx: -40 });
  const letters = (parent, from, to) => {
    const axis = ui.axis(parent, { side: "bottom", at: bottom, scale: ui.scale(0, 1, from, to),
                                   values: [], label: "response" });
    return n => {
      const scale = ui.scale(-.5, n - .5, from, to);
      axis.update({ scale, values: NAMES.slice(0, n).map((_, i) => i), format: i => NAMES[i] });
      return scale;
    };
  };
  const showLetters = letters(left, 40, 176);
  const setReward = (i, value) => {
    state.rewards[i] = math.clamp(Math.round(100 * value) / 100, 0, 1);
    sliders[i]?.set(state.rewards[i]);
    redraw();
  };
  const towers = NAMES.map((name, i) => {
    const hit = svg("rect", { y: 30, height: bottom - 30, fill: "transparent" });
    const bar = svg("rect", { fill: "currentColor", "fill-opacity": .3 });
    const cap = svg("rect", { height: 5, rx: 2.5, fill: "currentColor" });
    const text = svg("text", { "text-anchor": "middle" });
    const node = svg("g", {}, hit, bar, cap, text);
    left.append(node);
    ui.drag(node, p => setReward(i, yReward.invert(p.y)));
    const show = ui.handle(node, { label: `Reward of ${name}`, min: 0, max: 1, step: .01,
                                   get: () => state.rewards[i], onInput: v => setReward(i, v) });
    return { node, hit, bar, cap, text, show };
  });
  const drawTowers = () => {
    const scale = showLetters(state.n), slot = scale(1) - scale(0), width = .62 * slot;
    towers.forEach(({ node, hit, bar, cap, text, show }, i) => {
      if (i >= state.n) return node.remove();
      if (!node.isConnected) left.append(node);
      const x = scale(i), y = yReward(state.rewards[i]);
      set(hit, { x: x - slot / 2, width: slot });
      set(bar, { x: x - width / 2, width, y, height: bottom - y });
      set(cap, { x: x - width / 2, width, y: y - 2.5 });
      set(text, { x, y: y - 8, text: round(state.rewards[i]).replace(/^0/, "") });
      show(state.rewards[i]);
    });
  };

  // ---- a policy per method ----
  const OPEN = { fill: "none", stroke: "currentColor", "stroke-width": 1.3,
                 "stroke-dasharray": "3 2", "stroke-opacity": .75 };
  const GOAL = { stroke: "currentColor", "stroke-width": 2.6 };
  const yProb = ui.scale(0, 1, bottom, 44);
  const boards = SLOTS.map(k => {
    const board = ui.panel(panels, { width: 255, height: H, max: 1.35, label: "Policy" });
    const heading = svg("text", { x: 0, y: 14, class: "vcbx-heading" });
    board.append(heading);
    ui.axis(board, { side: "left", at: 36, scale: yProb, label: "probability", grid: 251,
                     dx: -36 });
    const place = letters(board, 36, 251);
    const rows = NAMES.map(() => {
      const row = { sft: svg("rect", OPEN), now: svg("rect"), goal: svg("line", GOAL) };
      board.append(row.now, row.sft, row.goal);
      return row;
    });
    return { board, heading, place, rows };
  });
  const drawBoard = (k, ref, logps, goal) => {
    const { board, heading, place, rows } = boards[k], scale = place(state.n);
    const width = .8 * (scale(1) - scale(0)), shade = ui.tint(style(k).color);
    const title = `${["First", "Second"][k]}: ${style(k).label}`;
    heading.style.fill = ui.ink(style(k).color);
    set(heading, { text: title });
    set(board, { "aria-label": `Policy of the method. ${title}` });
    rows.forEach(({ sft, now, goal: mark }, i) => {
      const visibility = i < state.n ? "visible" : "hidden";
      for (const node of [sft, now, mark]) set(node, { visibility });
      if (i >= state.n) return;
      const x = scale(i), p = Math.exp(logps[i]), s = Math.exp(ref[i]), g = Math.exp(goal[i]);
      now.style.fill = shade;
      set(now, { x: x - .36 * width, width: .72 * width, y: yProb(p), height: bottom - yProb(p) });
      set(sft, { x: x - .46 * width, width: .92 * width, y: yProb(s), height: bottom - yProb(s) });
      set(mark, { x1: x - width / 2, x2: x + width / 2, y1: yProb(g), y2: yProb(g) });
    });
  };
  const key = ui.el("p", { class: "vcbx-key" });
  const swatch = (shape, text) => key.append(ui.el("span", {},
    svg("svg", { width: 18, height: 14, "aria-hidden": "true" }, shape), text));
  swatch(svg("rect", { x: 2, y: 1, width: 14, height: 12, ...OPEN }), "SFT policy");
  swatch(svg("rect", { x: 2, y: 1, width: 14, height: 12, fill: "currentColor",
                       "fill-opacity": .6 }), "trained policy π (in its method’s colour)");
  swatch(svg("line", { x1: 0, x2: 18, y1: 7, y2: 7, ...GOAL }), "target π*");
  root.append(key);

  // ---- gaps against gaps, and the numbers ----
  const lower = ui.row(root), G = 300, floor = G - 46;
  lower.style.marginTop = "12px";
  const chart = ui.panel(lower, { width: 390, height: G, max: 1.1,
                                  label: "Log-ratio gap against reward gap, a mark per pair" });
  chart.append(svg("text", { x: 0, y: 14, class: "vcbx-heading",
                             text: "Every pair: what it is asked, what it got" }));
  const xAxis = ui.axis(chart, { side: "bottom", at: floor, scale: ui.scale(0, 1, 46, 384),
                                 label: "reward gap (rᵢ − rⱼ)/σ" });
  const yAxis = ui.axis(chart, { side: "left", at: 46, scale: ui.scale(0, 1, floor, 48),
                                 grid: 384, dx: -46, label: "log-ratio gap ℓᵢ − ℓⱼ (nats)" });
  const marks = SLOTS.map(() => {
    const line = svg("line", { "stroke-width": 1.6, "stroke-dasharray": "5 4" });
    const points = Array.from({ length: PAIRS }, () => svg("path", { "stroke-width": 1.2 }));
    chart.append(line, ...points);
    return { line, points };
  });
  const roundUp = x => [.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200].find(t => t >= x) ?? x;
  const drawGaps = found => {
    const all = found.flat(), top = roundUp(Math.max(.5, ...all.map(g => g.got)));
    const low = Math.min(0, ...all.map(g => g.got)), far = roundUp(Math.max(
      .5, ...all.map(g => g.asked)));
    const x = ui.scale(0, far, 46, 384), y = ui.scale(low < 0 ? -roundUp(-low) : 0, top, floor, 48);
    xAxis.update({ scale: x });
    yAxis.update({ scale: y });
    marks.forEach(({ line, points }, k) => {
      const shade = ui.tint(style(k).color), slope = 1 / state.gammas[k];
      const end = Math.min(far, top / slope);
      line.style.stroke = shade;
      set(line, { x1: x(0), y1: y(0), x2: x(end), y2: y(end * slope) });
      points.forEach((node, i) => {
        const gap = found[k][i];
        if (!gap) return set(node, { visibility: "hidden" });
        // The second method's marks are open, so that two of a kind can be told apart.
        node.style.cssText = `stroke:${shade};fill:${k ? "none" : shade}`;
        return set(node, { visibility: "visible", d: ui.marker(style(k).marker, k ? 6 : 4.2),
                           transform: `translate(${x(gap.asked)} ${y(gap.got)})` });
      });
    });
  };
  const side = ui.el("div");
  side.style.cssText = "flex:1 1 300px;min-width:0;max-width:520px";
  lower.append(side);
  const facts = SLOTS.map(() => {
    const row = ui.row(side, "facts");
    row.style.gridTemplateColumns = "repeat(3, minmax(0, 1fr))";
    return ["kl", "reward", "off"].map(name => ui.fact(row, name));
  });
  const plain = ui.fact(ui.row(side, "facts"), "SFT policy: expected reward");
  const say = ui.announcer(side);
  const showNumbers = (k, { kl, reward, off }) => {
    const { label } = style(k), [a, b, c] = facts[k];
    a(round(kl), `${label}: KL(π ‖ SFT), nats`);
    b(round(reward, 3), `${label}: expected reward`);
    c(round(off), `${label}: KL(π ‖ π*), nats`);
  };

  // ---- controls ----
  const controls = ui.row(root, "controls");
  const options = Object.fromEntries(Object.keys(config.strengths)
    .map(m => [m, config.methods[m].label]));
  const box = ui.fieldset(controls, "Methods and their strength");
  const slots = SLOTS.map(k => {
    const name = ["First", "Second"][k];
    const choose = ui.select(box, { label: `${name} method`, options, value: state.methods[k],
      onInput: m => { state.methods[k] = m; refill(k); redraw(); } });
    const place = ui.el("div");
    box.append(place);
    return { choose, place };
  });
  // The strength in the method's own units; what is kept is gamma, so that a change of method
  // keeps the strength.
  const refill = k => {
    const { choose, place } = slots[k], method = state.methods[k], { param, symbol } = own(k);
    const inUnits = gamma => alike(method, param, gamma), [low, high] = config.range;
    const ends = [inUnits(low), inUnits(high)].sort((a, b) => a - b);
    choose.set(method);
    place.replaceChildren();
    ui.slider(place, { label: `Strength ${symbol}`, min: ends[0], max: ends[1], log: true,
      name: `Strength ${symbol} of ${style(k).label}, ${["first", "second"][k]} method`,
      value: inUnits(state.gammas[k]),
      onInput: v => { state.gammas[k] = method === "ipo" ? 2 * v : inUnits(v); redraw(); } });
  };
  const dataBox = ui.fieldset(controls, "Rewards", "short"), places = ui.el("div");
  const count = ui.slider(dataBox, { label: "responses", min: 3, max: MOST, step: 1,
    value: state.n, format: x => round(x, 0),
    onInput: v => { state.n = v; refillRewards(); redraw(); } });
  dataBox.append(places);
  let sliders = [];
  const refillRewards = () => {
    places.replaceChildren();
    sliders = NAMES.slice(0, state.n).map((name, i) => ui.slider(places, { label: name,
      name: `Reward of ${name}, slider`, min: 0, max: 1, step: .01, value: state.rewards[i],
      onInput: v => setReward(i, v) }));
  };
  const trainBox = ui.fieldset(controls, "Training by gradient descent (Adam)", "short");
  const setStep = v => { state.step = v; training.set(v); redraw(); };
  const training = ui.slider(trainBox, { label: "steps", name: "Gradient steps", min: 0, step: 1,
    max: STEPS, value: state.step, format: x => round(x, 0),
    onInput: v => { player.stop(); setStep(v); } });
  const player = ui.player({ most: STEPS, get: () => state.step, put: setStep });
  const buttons = ui.row(trainBox, "buttons");
  ui.button(buttons, { label: "Play", onClick: player.play });
  ui.button(buttons, { label: "Step", onClick: () => {
    player.stop();
    setStep(Math.min(STEPS, state.step + 1));
  } });
  ui.button(buttons, { label: "Reset", onClick: () => {
    player.stop();
    state = begin();
    count.set(state.n);
    SLOTS.forEach(refill);
    refillRewards();
    setStep(state.step);
  } });
  root.append(ui.el("details", {}, ui.el("summary", { text: "Where each loss ends, in words" }),
    ui.el("ul", {}, ...Object.keys(config.strengths).map(m => ui.el("li", {},
      ui.el("b", { text: `${config.methods[m].label}: ` }), config.limits[m])))));

  // ---- one draw ----
  const words = (k, { kl, reward, off }) => {
    const { param, symbol } = own(k), strength = alike(state.methods[k], param, state.gammas[k]);
    return `${style(k).label} (${symbol} = ${round(strength)}) is ${round(off)} nats from its `
      + `target π*, at a KL of ${round(kl)} nats from the SFT policy and a reward of `
      + `${round(reward)}.`;
  };
  const draw = () => {
    const r = rewards(), ref = reference(), ends = SLOTS.map(k => path(k)[state.step]);
    const goals = SLOTS.map(k => target(state.gammas[k], ref, r));
    const numbers = SLOTS.map(k => measure(ends[k], goals[k], ref, r));
    drawTowers();
    SLOTS.forEach(k => drawBoard(k, ref, ends[k], goals[k]));
    drawGaps(ends.map(end => gaps(end, ref, r)));
    numbers.forEach((found, k) => showNumbers(k, found));
    plain(round(math.expected(ref, r), 3));
    say(math.ordered(r).length ? `After ${state.step} steps ${words(0, numbers[0])} `
      + words(1, numbers[1]) : "All rewards are equal: there is nothing to learn.");
  };
  SLOTS.forEach(refill);
  refillRewards();
  draw();
});
