// Order against value: where each loss drives three log-ratios, and what it makes of the rewards.
globalThis.VCBX.register("order_value", (root, config) => {
  const { math, ui } = VCBX;
  const names = Object.keys(config.methods).filter(m => m in config.limits);
  const NAMES = ["A", "B", "C"], STEPS = config.steps;
  const low = Math.min(0, ...config.rewards), high = Math.max(1, ...config.rewards);
  const color = name => ui.tint(config.methods[name].color);
  const fresh = () => ({
    rewards: config.rewards.slice(), weights: config.probs.slice(), training: config.training,
    strength: Object.fromEntries(names.map(m => [m, config.strengths[m]?.value])),
    ticked: Object.fromEntries(names.map(m => [m, true])),
  });
  let state = fresh();

  // ---- what the losses do: the path of gradient descent, kept until an input changes ----
  const cache = {};
  // All that an order-based loss sees of the rewards is which beats which.
  const seen = name => name === "vcb" ? state.rewards : math.ordered(state.rewards);
  const trained = (name, ref) => {
    const key = [seen(name), ref, state.strength[name]].join(";");
    if (cache[name]?.key !== key) cache[name] = { key, path: [ref] };
    const { path } = cache[name], steps = state.training - path.length + 1;
    if (steps > 0) {
      const params = { [config.strengths[name]?.param]: state.strength[name] };
      const options = { steps, lr: config.lr, start: path.at(-1) };
      path.push(...math.descend(name, ref, state.rewards, params, options).slice(1));
    }
    return path[state.training];
  };

  // ---- the rewards, draggable ----
  const panels = ui.row(root), H = 322, bottom = H - 46;
  const left = ui.panel(panels, { width: 196, height: H, max: 1.15,
                                  label: "Rewards of the three responses" });
  const y = ui.scale(low, high, bottom, 44), xLeft = i => 66 + 46 * i;
  left.append(ui.svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "Rewards (drag)" }));
  ui.axis(left, { side: "left", at: 40, scale: y, label: "reward r", grid: 190, dx: -40 });
  ui.axis(left, { side: "bottom", at: bottom, scale: ui.scale(-.56, 2.65, 40, 190),
                  values: [0, 1, 2], format: i => NAMES[i], label: "response" });
  const setReward = (i, value) => {
    state.rewards[i] = math.clamp(Math.round(value * 100) / 100, low, high);
    rewardSliders[i].set(state.rewards[i]);
    redraw();
  };
  const bars = NAMES.map((name, i) => {
    const hit = ui.svg("rect", { x: xLeft(i) - 21, width: 42, y: 30, height: bottom - 30,
                                 fill: "transparent" });
    const bar = ui.svg("rect", { x: xLeft(i) - 14, width: 28, fill: "currentColor",
                                 "fill-opacity": .3 });
    const cap = ui.svg("rect", { x: xLeft(i) - 14, width: 28, height: 5, rx: 2.5,
                                 fill: "currentColor" });
    const text = ui.svg("text", { x: xLeft(i), "text-anchor": "middle" });
    const node = ui.svg("g", {}, hit, bar, cap, text);
    left.append(node);
    ui.drag(node, p => setReward(i, y.invert(p.y)));
    const show = ui.handle(node, { label: `Reward of ${name}`, min: low, max: high, step: .01,
                                   get: () => state.rewards[i], onInput: v => setReward(i, v) });
    return value => {
      const [top, zero] = [y(Math.max(value, 0)), y(Math.min(value, 0))];
      ui.set(bar, { y: top, height: zero - top });
      ui.set(cap, { y: y(value) - 2.5 });
      ui.set(text, { y: y(value) - 8, text: ui.round(value) });
      show(value);
    };
  });

  // ---- one ruler per method ----
  const middle = ui.panel(panels, { width: 380, height: H,
                                    label: "Log-ratios of the responses by method" });
  const [from, to] = [72, 306], first = 62, gap = (bottom - 10 - first) / names.length;
  const compared = ui.svg("text", { x: 380, y: 34, class: "vcbx-note", "text-anchor": "end" });
  middle.append(compared, ui.svg("text", { x: 0, y: 14, class: "vcbx-heading",
                                           text: "How far apart each loss puts them" }));
  const span = top => ui.scale(0, top, from, to);
  const xAxis = ui.axis(middle, { side: "bottom", at: bottom, scale: span(4),
                                  label: "log-ratio above the worst response (nats)" });
  const guides = NAMES.map(() => {
    const node = ui.svg("line", { y1: first, y2: bottom, stroke: "currentColor",
                                  "stroke-opacity": .4, "stroke-dasharray": "1 3" });
    middle.append(node);
    return node;
  });
  // Letters stand over their marks, moved apart where the marks are close.
  const spread = xs => {
    const sorted = xs.map((_, i) => i).sort((a, b) => xs[a] - xs[b]), out = xs.slice();
    for (let pass = 0; pass < 4; pass++) for (let k = 1; k < sorted.length; k++) {
      const [a, b] = [sorted[k - 1], sorted[k]], miss = 11 - (out[b] - out[a]);
      if (miss > 0) { out[a] -= miss / 2; out[b] += miss / 2; }
    }
    return out;
  };
  const ruler = (label, paint, ink, shape, dash, open) => {
    const bar = ui.svg("line", { stroke: paint, "stroke-width": 2, "stroke-dasharray": dash });
    const marks = NAMES.map(() => ui.svg("path", {
      d: ui.marker(shape, 4.6), stroke: paint, "stroke-width": 1.6,
      fill: open ? "none" : paint }));
    const letters = NAMES.map(text => ui.svg("text", { text, "text-anchor": "middle",
                                                       class: "vcbx-letter" }));
    const ratio = ui.svg("text", { x: 380, "text-anchor": "end" });
    const title = ui.svg("text", { x: 0, text: label, style: `fill: ${ink}; font-weight: 600` });
    const node = ui.svg("g", {}, bar, ...marks, ...letters, ratio, title);
    middle.append(node);
    return (at, scale, offsets, text, visible) => {
      ui.set(node, { visibility: visible ? "visible" : "hidden" });
      if (!visible) return;
      const xs = offsets.map(scale), apart = spread(xs);
      ui.set(bar, { x1: Math.min(...xs), x2: Math.max(...xs), y1: at, y2: at });
      marks.forEach((m, i) => ui.set(m, { transform: `translate(${xs[i].toFixed(2)} ${at})` }));
      letters.forEach((t, i) => ui.set(t, { x: apart[i].toFixed(1), y: at - 9 }));
      ui.set(ratio, { y: at + 4, text });
      ui.set(title, { y: at + 4 });
    };
  };
  const asked = ruler("rewards", "currentColor", "currentColor", "o", "", true);
  const rulers = Object.fromEntries(names.map(m => {
    const { label, marker, dash, color: plain } = config.methods[m];
    return [m, ruler(label, color(m), ui.ink(plain), marker, dash, false)];
  }));

  // ---- the policy ----
  const right = ui.panel(panels, { width: 310, height: H, max: 1.15,
                                   label: "Policy that each method makes" });
  const yProb = ui.scale(0, 1, bottom, 44), xGroup = i => 42 + 88 * i;
  right.append(ui.svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "The policy it makes" }));
  ui.axis(right, { side: "left", at: 36, scale: yProb, label: "probability", grid: 306, dx: -36 });
  ui.axis(right, { side: "bottom", at: bottom, scale: ui.scale(-.51, 2.55, 36, 306),
                   values: [0, 1, 2], format: i => NAMES[i], label: "response" });
  const columns = Object.fromEntries(["sft", ...names].map(m => [m, NAMES.map(() => {
    const node = ui.svg("rect", { fill: color(m), "fill-opacity": m === "sft" ? .55 : .95 });
    right.append(node);
    return node;
  })]));
  const targets = NAMES.map(() => {
    const node = ui.svg("line", { stroke: "currentColor", "stroke-width": 2 });
    right.append(node);
    return node;
  });
  const key = ui.el("p", { class: "vcbx-key" });
  for (const m of ["sft", ...names]) {
    const swatch = ui.el("i");
    swatch.style.background = color(m);
    key.append(ui.el("span", {}, swatch, config.methods[m].label));
  }
  key.append(ui.el("span", {}, ui.el("i", { class: "vcbx-line-key" }), "VCB's optimum"));
  root.append(key);

  // ---- controls ----
  const say = ui.announcer(root);
  const controls = ui.row(root, "controls");
  const methodBox = ui.fieldset(controls, "Methods and their strength");
  const checks = {}, strengths = {};
  for (const m of names) {
    const line = ui.row(methodBox, "method");
    checks[m] = ui.checkbox(line, { label: config.methods[m].label, value: state.ticked[m],
                                    onInput: v => { state.ticked[m] = v; redraw(); } });
    if (!config.strengths[m]) continue;
    const { symbol, min, max } = config.strengths[m];
    strengths[m] = ui.slider(line, { label: symbol, min, max, value: state.strength[m], log: true,
                                     name: `${symbol} of ${config.methods[m].label}`,
                                     onInput: v => { state.strength[m] = v; redraw(); } });
  }
  const dataBox = ui.fieldset(controls, "Rewards", "short");
  const rewardSliders = NAMES.map((name, i) => ui.slider(dataBox, {
    label: name, name: `Reward of ${name}, slider`, min: low, max: high, step: .01,
    value: state.rewards[i], onInput: v => setReward(i, v) }));
  const sftBox = ui.fieldset(controls, "SFT policy, relative weights", "short");
  const weightSliders = NAMES.map((name, i) => ui.slider(sftBox, {
    label: name, name: `SFT weight of ${name}`, min: .05, max: 1, step: .01,
    value: state.weights[i], onInput: v => { state.weights[i] = v; redraw(); } }));
  const trainBox = ui.fieldset(controls, "Training by gradient descent", "short");
  const training = ui.slider(trainBox, { label: "steps", name: "Gradient steps", min: 0, step: 1,
    max: STEPS, value: state.training, format: x => ui.round(x, 0),
    onInput: v => { state.training = v; redraw(); } });
  const buttons = ui.row(trainBox, "buttons");
  const load = values => {
    state = Object.assign(fresh(), values);
    NAMES.forEach((_, i) => {
      rewardSliders[i].set(state.rewards[i]);
      weightSliders[i].set(state.weights[i]);
    });
    names.forEach(m => { checks[m].set(state.ticked[m]); strengths[m]?.set(state.strength[m]); });
    training.set(state.training);
    redraw();
  };
  ui.button(buttons, { label: "Reset", onClick: () => load({}) });
  root.append(ui.el("details", {}, ui.el("summary", { text: "Where each loss ends, in words" }),
    ui.el("ul", {}, ...names.map(m => ui.el("li", {},
      ui.el("b", { text: `${config.methods[m].label}: ` }), config.limits[m])))));

  // ---- one draw ----
  // Gap of worst to middle against middle to best, by the order of the rewards.
  const ratioOf = (values, ranks) => {
    const [a, b, c] = ranks.map(i => values[i]), lower = b - a, upper = c - b;
    if (Math.abs(lower) < .005 && Math.abs(upper) < .005) return "no gap";
    if (Math.abs(upper) < .005) return "1 : 0";
    if (Math.abs(lower) < .005) return "0 : 1";
    const q = lower / upper;
    if (Math.abs(q - 1) < .05) return "1 : 1";
    return Math.abs(q) < 1 ? `1 : ${ui.round(1 / q, 1)}`
      : `${ui.round(q, 1)} : 1`;
  };
  const drawRulers = (ref, ranks, found, target) => {
    const above = values => values.map(v => v - values[ranks[0]]);
    const shown = names.filter(m => state.ticked[m]);
    const offsets = Object.fromEntries(shown.map(m => [m, above(math.ratios(found[m], ref))]));
    const widest = Math.max(.5, ...target, ...shown.flatMap(m => offsets[m]));
    const top = [1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500].find(t => t >= widest * .99);
    const scale = span(top ?? widest);
    xAxis.update({ scale });
    guides.forEach((g, i) => ui.set(g, { x1: scale(target[i]), x2: scale(target[i]) }));
    asked(first - 6, scale, target, ratioOf(state.rewards, ranks), true);
    shown.forEach((m, k) => rulers[m](first + gap * (k + .85), scale, offsets[m],
                                      ratioOf(offsets[m], ranks), true));
    names.filter(m => !state.ticked[m]).forEach(m => rulers[m](0, scale, [], "", false));
    return offsets;
  };
  const drawPolicy = (ref, found, optimum) => {
    const shown = ["sft", ...names.filter(m => state.ticked[m])], width = 74 / shown.length;
    for (const [m, nodes] of Object.entries(columns)) nodes.forEach((node, i) => {
      const k = shown.indexOf(m);
      if (k < 0) return ui.set(node, { visibility: "hidden" });
      const p = Math.exp((m === "sft" ? ref : found[m])[i]);
      return ui.set(node, { visibility: "visible", x: (xGroup(i) + k * width).toFixed(2),
        width: Math.max(width - 2, 2).toFixed(2), y: yProb(p).toFixed(2),
        height: (bottom - yProb(p)).toFixed(2) });
    });
    targets.forEach((node, i) => ui.set(node, { x1: xGroup(i) - 3, x2: xGroup(i) + 75,
      y1: yProb(Math.exp(optimum[i])), y2: yProb(Math.exp(optimum[i])) }));
  };
  const sentence = (ranks, offsets) => {
    const [a, b, c] = ranks.map(i => NAMES[i]), r = state.rewards;
    const [lower, upper] = [r[ranks[1]] - r[ranks[0]], r[ranks[2]] - r[ranks[1]]];
    const part = (m, i, j) => ui.round(offsets[m][ranks[i]] - offsets[m][ranks[j]]);
    const said = Object.keys(offsets).map(m => `${config.methods[m].label} ` +
      `${part(m, 1, 0)} and ${part(m, 2, 1)}`);
    return `${b} beats ${a} by ${ui.round(lower)} in reward, ${c} beats ${b} by ` +
      `${ui.round(upper)}. After ${state.training} steps the log-ratio gaps in nats are: ` +
      `${said.join("; ") || "no method ticked"}.` + (state.ticked.ipo && upper > 0 && lower > 0
        ? ` IPO asks the same gap, ${ui.round(.5 / state.strength.ipo)}, of every pair.` : "");
  };
  const draw = () => {
    const { rewards } = state, ref = math.logSoftmax(state.weights.map(Math.log));
    const ranks = [0, 1, 2].sort((i, j) => rewards[i] - rewards[j]);
    const shown = names.filter(m => state.ticked[m]);
    const found = Object.fromEntries(shown.map(m => [m, trained(m, ref)]));
    const signal = math.ordered(rewards).length > 0;
    const sigma = math.std(rewards), gamma = state.strength.vcb;
    const target = rewards.map(r => signal ? (r - rewards[ranks[0]]) / (gamma * sigma) : 0);
    const optimum = signal ? math.optimum(ref, rewards, gamma, sigma) : ref;
    const [a, b, c] = ranks.map(i => NAMES[i]);
    ui.set(compared, { text: `gaps ${a}${b} : ${b}${c}` });
    bars.forEach((show, i) => show(rewards[i]));
    const offsets = drawRulers(ref, ranks, found, target);
    drawPolicy(ref, found, optimum);
    say(signal ? sentence(ranks, offsets) : "All rewards are equal: there is nothing to learn.");
  };
  const redraw = ui.schedule(draw);
  draw();
});
