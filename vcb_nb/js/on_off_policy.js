// VCB in a table, on n candidates per step: drawn once from the SFT policy, or fresh every step.
VCBX.onOffPolicy = (() => {
  const { math } = VCBX;

  // Uniform numbers from a seed (mulberry32).
  const random = seed => {
    let state = seed * 0x9E3779B1 | 0;
    return () => {
      state = state + 0x6D2B79F5 | 0;
      let t = Math.imul(state ^ state >>> 15, state | 1);
      t ^= t + Math.imul(t ^ t >>> 7, t | 61);
      return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
    };
  };
  // n responses with replacement, by the inverse of the distribution function.
  const drawn = (logps, n, uniform) => Array.from({ length: n }, () => {
    let left = uniform();
    const found = logps.findIndex(l => (left -= Math.exp(l)) < 0);
    return found < 0 ? logps.length - 1 : found;
  });

  // The gradient of VCB's loss on these candidates, by the log-prob of each response.
  const slopeOn = (index, logps, ref, rewards, params) => {
    const pick = values => index.map(i => values[i]), g = logps.map(() => 0);
    const found = math.slopes.vcb(pick(ref), pick(rewards), params)(pick(logps));
    found.forEach((v, k) => { g[index[k]] += v; });
    return g;
  };

  // All steps of Adam, its rate falling to 0: policies, and the candidates of each step.
  const train = (ref, rewards, { fresh, n, gamma, seed, steps, lr }) => {
    const uniform = random(seed), params = { gamma, sigma: math.rewardStd(ref, rewards) };
    const step = math.adam(ref), path = [ref], picks = [];
    let index = drawn(ref, n, uniform);
    for (let s = 0; s < steps; s++) {
      if (fresh && s) index = drawn(path[s], n, uniform);
      picks.push(index);
      path.push(step(slopeOn(index, path[s], ref, rewards, params), lr * (1 - s / steps)));
    }
    return { path, picks };
  };

  return { random, drawn, train };
})();

VCBX.register("on_off_policy", (root, config) => {
  const { math, ui } = VCBX, { train } = VCBX.onOffPolicy, { svg, set, round } = ui;
  const KINDS = ["fixed", "fresh"], STEPS = config.steps, { rewards } = config;
  const looks = { fixed: config.methods.vcb, fresh: config.methods.vcb_online };
  const names = { fixed: "drawn once from SFT", fresh: "fresh every step" };
  const ref = math.logSoftmax(config.probs.map(Math.log)), K = rewards.length;
  const begin = () => ({ n: config.n, gamma: config.gamma, seed: config.seed,
                         step: config.training });
  let state = begin(), kept = {};
  const redraw = ui.schedule(() => draw());
  const color = kind => ui.tint(looks[kind].color);
  // Open bars for candidates drawn once, full ones for fresh: the two colours are relatives.
  const fill = (node, kind) => {
    node.style.cssText = `fill:${color(kind)};stroke:${color(kind)};stroke-width:1.5;`
      + `fill-opacity:${kind === "fixed" ? .22 : 1}`;
    return node;
  };

  const runs = () => {
    const { n, gamma, seed } = state, key = [n, gamma, seed].join(";");
    if (kept.key === key) return kept;
    const goal = math.optimum(ref, rewards, gamma), found = { key, goal };
    for (const kind of KINDS) {
      const { path, picks } = train(ref, rewards, { fresh: kind === "fresh", n, gamma, seed,
                                                    steps: STEPS, lr: config.lr });
      found[kind] = { path, picks, off: path.map(logps => math.kl(logps, goal)) };
    }
    return kept = found;
  };

  // ---- the policies ----
  const panels = ui.row(root), W = 390, H = 300, bottom = H - 66;
  const left = ui.panel(panels, { width: W, height: H,
                                  label: "Both policies over the responses, and π*" });
  left.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "Policies" }));
  const xBar = ui.scale(-.5, K - .5, 40, W - 4), slot = xBar(1) - xBar(0);
  let yProb = ui.scale(0, 1, bottom, 46);
  const probAxis = ui.axis(left, { side: "left", at: 40, scale: yProb, label: "probability",
                                   grid: W - 4, dx: -40 });
  ui.axis(left, { side: "bottom", at: bottom + 20, scale: xBar, values: rewards.map((_, i) => i),
                  format: i => round(rewards[i], 1), label: "responses, by reward r" });
  const OPEN = { fill: "none", stroke: "currentColor", "stroke-width": 1.3,
                 "stroke-dasharray": "3 2", "stroke-opacity": .75 };
  const GOAL = { stroke: "currentColor", "stroke-width": 2.4 };
  const rows = rewards.map((_, i) => {
    const bars = KINDS.map((kind, k) => fill(svg("rect", {
      x: xBar(i) + (k ? .02 : -.36) * slot, width: .34 * slot }), kind));
    const sft = svg("rect", { ...OPEN, x: xBar(i) - .42 * slot, width: .84 * slot });
    const goal = svg("line", { ...GOAL, x1: xBar(i) - .45 * slot, x2: xBar(i) + .45 * slot });
    const tally = svg("text", { x: xBar(i), y: bottom + 15, "text-anchor": "middle" });
    left.append(...bars, sft, goal, tally);
    return { bars, sft, goal, tally };
  });
  left.append(svg("text", { x: 0, y: bottom + 15, text: "drawn", class: "vcbx-note" }));

  // ---- the distance from the optimum, step by step ----
  const right = ui.panel(panels, { width: W, height: H,
                                   label: "Distance from the optimum against the step" });
  right.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "Distance from π*" }));
  const floor = H - 46, x = ui.scale(0, STEPS, 52, W - 8), y = ui.scale(-8, 1, floor, 46);
  ui.axis(right, { side: "left", at: 52, scale: y, values: [-8, -6, -4, -2, 0], grid: W - 8,
                   format: v => ["10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1"][v / 2 + 4], dx: -52,
                   label: "KL(π ‖ π*) (nats, log scale)" });
  ui.axis(right, { side: "bottom", at: floor, scale: x, label: "gradient step" });
  const height = kl => y(math.clamp(Math.log10(Math.max(kl, 1e-300)), -8, 1));
  const curves = KINDS.map(kind => {
    const node = svg("path", { fill: "none", "stroke-width": 2.4,
                               "stroke-dasharray": kind === "fixed" ? "7 4" : "" });
    node.style.stroke = color(kind);
    right.append(node);
    return node;
  });
  const cursor = svg("line", { y1: 46, y2: floor, stroke: "currentColor", "stroke-opacity": .5 });
  const dots = KINDS.map(kind => fill(svg("path", { d: ui.marker(looks[kind].marker, 6) }), kind));
  const knob = svg("g", {}, svg("rect", { x: -16, y: 46 - floor, width: 32, height: floor - 46,
                                          fill: "transparent" }),
                   svg("path", { d: "M-7 -12h14l-7 11z", fill: "currentColor" }));
  right.append(cursor, ...dots, knob);

  const key = ui.el("p", { class: "vcbx-key" });
  const swatch = (shape, text) => key.append(ui.el("span", {},
    svg("svg", { width: 18, height: 14, "aria-hidden": "true" }, shape), text));
  for (const kind of KINDS) swatch(fill(svg("rect", { x: 2, y: 1, width: 14, height: 12 }), kind),
                                   `candidates ${names[kind]}`);
  swatch(svg("rect", { x: 2, y: 1, width: 14, height: 12, ...OPEN }), "SFT policy");
  swatch(svg("line", { x1: 0, x2: 18, y1: 7, y2: 7, ...GOAL }), "optimum π*");
  root.append(key);

  // ---- numbers and controls ----
  const facts = ui.row(root, "facts");
  const show = { fixed: ui.fact(facts, "drawn once: KL(π ‖ π*)"),
                 fresh: ui.fact(facts, "fresh: KL(π ‖ π*)"),
                 unseen: ui.fact(facts, "drawn once: responses never drawn"),
                 unmet: ui.fact(facts, "fresh: responses not drawn yet") };
  const controls = ui.row(root, "controls");
  const data = ui.fieldset(controls, "Candidates and strength");
  const whole = v => round(v, 0), sliders = {};
  const change = name => v => { state[name] = v; redraw(); };
  sliders.n = ui.slider(data, { label: "candidates n", min: 2, max: 8, step: 1, value: state.n,
                                format: whole, onInput: change("n") });
  sliders.gamma = ui.slider(data, { label: "strength γ", min: .3, max: 3, log: true,
                                    value: state.gamma, onInput: change("gamma") });
  const chance = ui.fieldset(controls, "Chance and training");
  sliders.seed = ui.slider(chance, { label: "seed", min: 0, max: 19, step: 1, value: state.seed,
                                     format: whole, onInput: change("seed") });
  const setStep = v => {
    state.step = math.clamp(Math.round(v), 0, STEPS);
    sliders.step.set(state.step);
    redraw();
  };
  const moved = v => { player.stop(); setStep(v); };
  sliders.step = ui.slider(chance, { label: "steps", name: "Gradient steps", min: 0, max: STEPS,
                                     step: 1, value: state.step, format: whole, onInput: moved });
  const player = ui.player({ most: STEPS, get: () => state.step, put: setStep });
  const buttons = ui.row(chance, "buttons");
  ui.button(buttons, { label: "Play", onClick: player.play });
  ui.button(buttons, { label: "Reset", onClick: () => {
    player.stop();
    state = begin();
    for (const [name, slider] of Object.entries(sliders)) slider.set(state[name]);
    redraw();
  } });
  const say = ui.announcer(root);
  ui.drag(knob, p => moved(x.invert(p.x)));
  const showKnob = ui.handle(knob, { label: "Gradient step, on the curve", min: 0, max: STEPS,
    step: 5, get: () => state.step, text: whole, onInput: moved });

  // ---- one draw ----
  const tallies = picks => {
    const found = rewards.map(() => 0);
    picks.forEach(index => index.forEach(i => { found[i] += 1; }));
    return found;
  };
  const small = v => v < 5e-4 ? v.toExponential(0).replace("e-", " · 10⁻")
    .replace(/\d+$/, d => [...d].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")) : round(v, 3);
  const nats = v => v < 1e-12 ? "0" : small(v);
  const draw = () => {
    const found = runs(), { step } = state, tops = KINDS.flatMap(kind => found[kind].path[step]);
    const top = [.2, .4, .6, .8, 1].find(t => t >= Math.exp(Math.max(...tops, ...found.goal,
                                                                     ...ref))) ?? 1;
    probAxis.update({ scale: yProb = ui.scale(0, top, bottom, 46) });
    const once = tallies(found.fixed.picks.slice(0, 1));
    const met = tallies(found.fresh.picks.slice(0, step));
    const place = (node, logp) => set(node, { y: yProb(Math.exp(logp)),
                                              height: bottom - yProb(Math.exp(logp)) });
    rows.forEach(({ bars, sft, goal, tally }, i) => {
      KINDS.forEach((kind, k) => place(bars[k], found[kind].path[step][i]));
      place(sft, ref[i]);
      set(goal, { y1: yProb(Math.exp(found.goal[i])), y2: yProb(Math.exp(found.goal[i])) });
      set(tally, { text: once[i] ? `${once[i]}×` : "–" });
    });
    KINDS.forEach((kind, k) => {
      const { off } = found[kind];
      set(curves[k], { d: "M" + off.map((v, s) => `${x(s).toFixed(1)} ${height(v).toFixed(1)}`)
        .join("L") });
      set(dots[k], { transform: `translate(${x(step)} ${height(off[step])})` });
    });
    set(cursor, { x1: x(step), x2: x(step) });
    set(knob, { transform: `translate(${x(step)} ${floor})` });
    showKnob(step);
    const none = counts => counts.filter(c => !c).length;
    show.fixed(`${nats(found.fixed.off[step])} nats`);
    show.fresh(`${nats(found.fresh.off[step])} nats`);
    show.unseen(`${none(once)} of ${K}`);
    show.unmet(`${none(met)} of ${K}`);
    say(`After ${step} steps the policy with fresh candidates is ${nats(found.fresh.off[step])} `
      + `nats from the optimum. The one with ${state.n} candidates drawn once is `
      + `${nats(found.fixed.off[step])} nats away: ${none(once)} of ${K} responses were never `
      + "drawn, and only the normalisation moves their probability.");
  };
  draw();
});
