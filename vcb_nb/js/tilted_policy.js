// gamma moves the SFT policy to pi* = pi_sft exp(r / (gamma sigma)) / Z, along the exact frontier.
globalThis.VCBX.register("tilted_policy", (root, config) => {
  const { math, ui } = VCBX;
  const { optimum: target, vcb, sft } = config.methods;
  const order = config.rewards.map((_, i) => i)
    .sort((a, b) => config.rewards[a] - config.rewards[b]);
  const rewards = order.map(i => config.rewards[i]);
  const ref = math.logSoftmax(order.map(i => Math.log(config.probs[i])));
  const sigma = math.rewardStd(ref, rewards), start = math.expected(ref, rewards);
  const [low, high] = [.1, 10], best = Math.max(...rewards), n = rewards.length;
  const state = { gamma: config.gamma };

  // ---- the policy as bars ----
  const W = 380, H = 300;
  const panels = ui.row(root);
  const left = ui.panel(panels, { width: W, height: H, label: "Policy over the responses" });
  const xBar = ui.scale(-.5, n - .5, 44, W - 6), bottom = H - 46;
  const slot = xBar(1) - xBar(0);
  const yTop = top => ui.scale(0, top, bottom, 34);
  const probAxis = ui.axis(left, { side: "left", at: 44, scale: yTop(.2), label: "probability",
                                   grid: W - 6, dx: -40 });
  const every = Math.ceil(n / 7), shown = rewards.map((_, i) => i)
    .filter(i => (n - 1 - i) % every === 0);
  ui.axis(left, { side: "bottom", at: bottom, scale: xBar, values: shown,
                  format: i => ui.round(rewards[i], 1),
                  label: "responses, by reward r (units of r)" });
  const bar = (i, width, attrs) => {
    const node = ui.svg("rect", { x: xBar(i) - width * slot / 2, width: width * slot, ...attrs });
    left.append(node);
    return node;
  };
  const before = rewards.map((_, i) => bar(i, .84, {
    fill: "none", stroke: ui.tint(sft.color), "stroke-width": 1.6, "stroke-dasharray": "3 2" }));
  const now = rewards.map((_, i) => bar(i, .62, { fill: ui.tint(vcb.color), "fill-opacity": .9 }));
  const key = (x, attrs, text, textAttrs = {}) => left.append(
    ui.svg("rect", { x, y: 8, width: 12, height: 12, ...attrs }),
    ui.svg("text", { x: x + 17, y: 18, text, ...textAttrs }));
  key(150, { fill: "none", stroke: ui.tint(sft.color), "stroke-width": 1.6,
             "stroke-dasharray": "3 2" }, "SFT policy");
  key(252, { fill: ui.tint(vcb.color) }, "optimal policy");

  // ---- the frontier ----
  const right = ui.panel(panels, { width: W, height: H, label: "Expected reward against KL" });
  const gammas = Array.from({ length: 241 }, (_, k) => high * (low / high) ** (k / 240));
  const curve = math.frontier(ref, rewards, gammas);
  const x = ui.scale(0, curve.at(-1).kl * 1.06, 48, W - 10);
  const y = ui.scale(start - .04 * (best - start), best + .06 * (best - start), bottom, 34);
  ui.axis(right, { side: "left", at: 48, scale: y, dx: -42,
                   label: "expected reward (units of r)" });
  ui.axis(right, { side: "bottom", at: bottom, scale: x, label: "KL from the SFT policy (nats)" });
  const line = (points, attrs) => right.append(ui.svg("path", { fill: "none", ...attrs,
    d: "M" + points.map(p => `${x(p.kl).toFixed(1)} ${y(p.reward).toFixed(1)}`).join("L") }));
  const gaussian = Array.from({ length: 121 }, (_, k) => {
    const kl = x.domain[1] * (k / 120) ** 2;
    return { kl, reward: start + sigma * Math.sqrt(2 * kl) };
  });
  const estimateColor = ui.tint(target.color);
  line(gaussian.filter(p => p.reward <= best), { stroke: estimateColor, "stroke-width": 1.4,
                                                 "stroke-dasharray": "2 3" });
  line([{ kl: 0, reward: start }, ...curve], { stroke: ui.tint(vcb.color), "stroke-width": 2.4 });
  const note = (kl, reward, text, attrs) => right.append(ui.svg("text", {
    x: x(kl), y: y(reward), text, class: "vcbx-note", ...attrs }));
  for (const gamma of [2, 1, .5, .25]) {
    const [p] = math.frontier(ref, rewards, [gamma]);
    right.append(ui.svg("circle", { cx: x(p.kl), cy: y(p.reward), r: 3,
                                    fill: ui.tint(vcb.color) }));
    note(p.kl, p.reward, `γ = ${gamma}`, { dx: 8, dy: 14 });
  }
  const guide = () => {
    const node = ui.svg("line", { stroke: "currentColor", "stroke-opacity": .45,
                                  "stroke-dasharray": "1 3" });
    right.append(node);
    return node;
  };
  const down = guide(), across = guide();
  const estimate = ui.svg("path", { d: ui.marker("D", 5), fill: "none", stroke: estimateColor,
                                    "stroke-width": 1.6 });
  const knob = ui.svg("g", {}, ui.svg("circle", { r: 20, fill: "transparent" }),
                      ui.svg("circle", { r: 8, fill: ui.tint(vcb.color),
                                         stroke: "currentColor", "stroke-width": 1.5 }));
  right.append(estimate, knob);

  const legend = (row, text, ...shapes) => right.append(...shapes,
    ui.svg("text", { x: 210, y: bottom - 58 + 20 * row, text }));
  const dash = (row, attrs) => ui.svg("path", { d: `M178 ${bottom - 62 + 20 * row}h24`, ...attrs });
  legend(0, "exact frontier", dash(0, { stroke: ui.tint(vcb.color), "stroke-width": 2.4 }));
  legend(1, "if rewards were Gaussian", dash(1, { stroke: estimateColor, "stroke-width": 1.4,
                                                  "stroke-dasharray": "2 3" }));
  legend(2, "its point at this γ", ui.svg("path", { d: ui.marker("D", 5), fill: "none",
    stroke: estimateColor, "stroke-width": 1.6, transform: `translate(190 ${bottom - 22})` }));

  // ---- readouts and controls ----
  const facts = ui.row(root, "facts");
  const fact = name => ui.fact(facts, name);
  const show = { reward: fact("expected reward"), kl: fact("KL, exact"),
                 estimate: fact("KL, Gaussian 1/(2γ²)"), z: fact("log Z(x)") };
  const controls = ui.row(root, "controls");
  const box = ui.fieldset(controls, "Strength of the pull to the SFT policy", "short");
  const setGamma = gamma => {
    state.gamma = math.clamp(gamma, low, high);
    slider.set(state.gamma);
    redraw();
  };
  const slider = ui.slider(box, { label: "γ", min: low, max: high, value: state.gamma, log: true,
                                  onInput: setGamma });
  ui.button(ui.row(controls, "buttons"), { label: "Reset", onClick: () => setGamma(config.gamma) });
  const say = ui.announcer(root);
  const nearest = p => curve.reduce((a, b) =>
    Math.hypot(x(b.kl) - p.x, y(b.reward) - p.y) < Math.hypot(x(a.kl) - p.x, y(a.reward) - p.y)
      ? b : a).gamma;
  ui.drag(knob, p => setGamma(nearest(p)));
  // Along the curve, right is more reward and more KL, hence a smaller gamma.
  const position = gamma => Math.log10(high / gamma);
  const showKnob = ui.handle(knob, {
    label: "Point on the frontier", min: 0, max: position(low), step: .05,
    get: () => position(state.gamma), text: () => `γ = ${ui.round(state.gamma)}`,
    onInput: p => setGamma(high / 10 ** p) });

  const draw = () => {
    const { gamma } = state, logps = math.optimum(ref, rewards, gamma, sigma);
    const probs = logps.map(Math.exp), kl = math.kl(logps, ref);
    const reward = math.expected(logps, rewards), gauss = .5 / gamma ** 2;
    const top = [.2, .4, .6, .8, 1].find(t => t >= Math.max(...probs, ...ref.map(Math.exp)));
    const scale = yTop(top ?? 1);
    probAxis.update({ scale });
    const height = (node, p) => ui.set(node, { y: scale(p), height: bottom - scale(p) });
    before.forEach((node, i) => height(node, Math.exp(ref[i])));
    now.forEach((node, i) => height(node, probs[i]));
    ui.set(knob, { transform: `translate(${x(kl)} ${y(reward)})` });
    showKnob(position(gamma));
    ui.set(down, { x1: x(kl), x2: x(kl), y1: y(reward), y2: bottom });
    ui.set(across, { x1: 48, x2: x(kl), y1: y(reward), y2: y(reward) });
    const inside = gauss < x.domain[1] && start + sigma / gamma < best;
    ui.set(estimate, { visibility: inside ? "visible" : "hidden",
                       transform: `translate(${x(gauss)} ${y(start + sigma / gamma)})` });
    show.reward(ui.round(reward));
    show.kl(`${ui.round(kl)} nats`);
    show.estimate(`${ui.round(gauss)} nats`);
    show.z(ui.round(math.logPartition(ref, rewards, gamma, sigma)));
    const likely = Math.max(...probs), its = rewards[probs.indexOf(likely)];
    say(`At γ = ${ui.round(gamma)} the optimal policy earns ${ui.round(reward)} on average, ` +
        `${ui.round(reward - start)} more than the SFT policy, at a KL of ${ui.round(kl)} nats. ` +
        `The likeliest response has reward ${ui.round(its, 1)} and probability ` +
        `${ui.round(likely)}.`);
  };
  const redraw = ui.schedule(draw);
  draw();
});
