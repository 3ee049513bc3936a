// A reward model that errs: by noise, by a bias, on few prompts or many, and what its policy gains.
VCBX.rewardErrors = (() => {
  // Six normal features of a response, of which the first is its quality and the second its length;
  // true reward: quality - bend/2 length^2. The seen one adds a bias b on length and noise of
  // variance v. VCB on m prompts of 8 candidates is a least-squares fit: it finds 1, b, and errors
  // of mean square v/(7 m) in each feature.
  const FEATURES = 6, CANDIDATES = 8;
  const correlation = accuracy => Math.sin(Math.PI * (accuracy - .5));
  const world = ({ accuracy, share, prompts, bend }) => {
    const spread = 1 / correlation(accuracy) ** 2; // variance of the seen reward, without bend
    const bias = Math.sqrt(share * (spread - 1)), noise = (1 - share) * (spread - 1);
    const blur = FEATURES * noise / (prompts * (CANDIDATES - 1));
    return { bend, bias, noise, spread, blur, norm: Math.sqrt(1 + bias * bias + blur) };
  };
  // Gains at a tilt of KL nats: of the true reward, of the seen one in its own deviations, and the
  // most that the KL can buy.
  const gains = ({ bend, bias, spread, norm }, kl) => {
    const t = Math.sqrt(2 * kl);
    return { best: t, truth: t / norm - bend / 2 * (t * bias / norm) ** 2,
             seen: t * (1 + bias * bias) / norm / Math.sqrt(spread) };
  };
  const spent = ({ spread, norm }, gamma) => norm * norm / (2 * gamma * gamma * spread);
  // Correlation of the policy's log-ratios with the seen and the true reward of new candidates.
  const plots = ({ bend, bias, spread, norm }) => ({
    seen: (1 + bias * bias) / (norm * Math.sqrt(spread)),
    truth: 1 / (norm * Math.sqrt(1 + bend * bend / 2)) });
  // The KL from which on the true reward falls.
  const turn = ({ bend, bias, norm }) => bend * bias > 0
    ? .5 * (norm / (bend * bias * bias)) ** 2 : Infinity;
  return { correlation, world, gains, spent, plots, turn };
})();

VCBX.register("reward_errors", (root, config) => {
  const { math, ui } = VCBX, { correlation, world, gains, spent, plots, turn } = VCBX.rewardErrors;
  const { svg, set, round } = ui, { vcb, sft } = config.methods;
  const [low, high] = config.range, W = 390, H = 300, bottom = H - 46;
  const begin = () => ({ accuracy: config.accuracy, share: config.share, prompts: config.prompts,
                         bend: config.bend, gamma: config.gamma });
  let state = begin();
  const redraw = ui.schedule(() => draw());
  const violet = ui.tint(vcb.color), grey = ui.tint(sft.color);

  // ---- held-out candidates ----
  const panels = ui.row(root);
  const left = ui.panel(panels, { width: W, height: H,
                                  label: "Rewards of new candidates against log-ratios" });
  left.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "New candidates" }));
  const across = ui.scale(-3, 3, 44, W - 10), height = ui.scale(-3.4, 3.4, bottom, 46);
  ui.axis(left, { side: "left", at: 44, scale: height, values: [-3, -2, -1, 0, 1, 2, 3],
                  grid: W - 10, dx: -44, label: "reward (its σ)" });
  ui.axis(left, { side: "bottom", at: bottom, scale: across, values: [-3, -2, -1, 0, 1, 2, 3],
                  label: "log-ratio of the policy (its σ)" });
  const ring = () => svg("circle", { r: 4.4, fill: "none", stroke: grey, "stroke-width": 1.5 });
  const dot = () => {
    const node = svg("circle", { r: 3.2 });
    node.style.fill = violet;
    return node;
  };
  const marks = config.draws.map(() => [ring(), dot()]);
  left.append(...marks.flat());

  // ---- gain against KL ----
  const right = ui.panel(panels, { width: W, height: H,
                                   label: "Gain in the seen and the true reward against KL" });
  right.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "What the policy gains" }));
  const MOST = 4, TOP = 3;
  const along = ui.scale(0, MOST, 44, W - 10), up = ui.scale(-.6, TOP, bottom, 46);
  ui.axis(right, { side: "left", at: 44, scale: up, values: [0, 1, 2, 3], grid: W - 10, dx: -44,
                   label: "gain (σ)" });
  ui.axis(right, { side: "bottom", at: bottom, scale: along, values: [0, 1, 2, 3, 4],
                   label: "KL from SFT (nats)" });
  const BEST = { stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "2 3" };
  const SEEN = { stroke: grey, "stroke-width": 2.2, "stroke-dasharray": "7 4" };
  const curve = attrs => {
    const node = svg("path", { fill: "none", ...attrs });
    right.append(node);
    return node;
  };
  const best = curve(BEST), seen = curve(SEEN), truth = curve({ "stroke-width": 2.6 });
  truth.style.stroke = violet;
  const knob = svg("g", {}, svg("circle", { r: 20, fill: "transparent" }),
                   svg("circle", { r: 8, stroke: "currentColor", "stroke-width": 1.5 }));
  knob.lastChild.style.fill = violet;
  right.append(knob);
  const keys = ui.el("p", { class: "vcbx-key" });
  const legend = (shape, text) => keys.append(ui.el("span", {},
    svg("svg", { width: 22, height: 14, "aria-hidden": "true" }, shape), text));
  const dash = attrs => svg("path", { d: "M0 7h22", fill: "none", ...attrs });
  const solid = dash({ "stroke-width": 2.6 }), filled = dot(), hollow = ring();
  solid.style.stroke = violet;
  for (const node of [filled, hollow]) set(node, { cx: 11, cy: 7 });
  legend(filled, "true reward");
  legend(hollow, "seen reward");
  legend(solid, "gain in the true reward");
  legend(dash(SEEN), "gain in the seen reward");
  legend(dash(BEST), "the most that this KL buys");
  root.append(keys);

  // ---- numbers and controls ----
  const facts = ui.row(root, "facts");
  const show = { rho: ui.fact(facts, "ρ of this accuracy"),
                 seen: ui.fact(facts, "correlation with the seen reward"),
                 truth: ui.fact(facts, "correlation with the true reward"),
                 kl: ui.fact(facts, "KL(π ‖ SFT)"), gain: ui.fact(facts, "true gain"),
                 share: ui.fact(facts, "of the most possible") };
  const controls = ui.row(root, "controls");
  const change = key => value => { state[key] = value; redraw(); };
  const model = ui.fieldset(controls, "The reward model");
  const sliders = {
    accuracy: ui.slider(model, { label: "accuracy", min: .55, max: .95, step: .01,
      value: state.accuracy, onInput: change("accuracy") }),
    share: ui.slider(model, { label: "share of bias", min: 0, max: 1, step: .05,
      value: state.share, onInput: change("share") }) };
  const rest = ui.fieldset(controls, "Training, and the truth");
  sliders.prompts = ui.slider(rest, { label: "prompts", min: 2, max: 1024, log: true,
    format: v => `${Math.round(v)}`, value: state.prompts, onInput: change("prompts") });
  sliders.bend = ui.slider(rest, { label: "harm of length", min: 0, max: 1.5, step: .05,
    value: state.bend, onInput: change("bend") });
  const strength = ui.fieldset(controls, "Strength of the pull to the SFT policy");
  const setGamma = gamma => {
    state.gamma = math.clamp(gamma, low, high);
    sliders.gamma.set(state.gamma);
    redraw();
  };
  sliders.gamma = ui.slider(strength, { label: "γ", min: low, max: high, log: true,
                                        value: state.gamma, onInput: setGamma });
  ui.button(ui.row(strength, "buttons"), { label: "Reset", onClick: () => {
    state = begin();
    for (const key in sliders) sliders[key].set(state[key]);
    redraw();
  } });
  const say = ui.announcer(root);
  const gammaAt = kl => Math.sqrt(spent(world(state), 1) / Math.max(kl, 1e-3));
  ui.drag(knob, p => setGamma(gammaAt(along.invert(p.x))));
  const showKnob = ui.handle(knob, { label: "The policy on the curve of the true gain, by KL",
    min: 0, max: MOST, step: .05, get: () => spent(world(state), state.gamma),
    text: kl => `KL = ${round(kl)} nats`, onInput: kl => setGamma(gammaAt(kl)) });

  // ---- one draw ----
  const line = points => "M" + points.map(p => p.map(v => v.toFixed(1)).join(" ")).join("L");
  const path = value => line(Array.from({ length: 121 }, (_, i) => MOST * (i / 120) ** 2)
    .map(kl => [kl, value(kl)]).filter(([, g]) => g >= -.6 && g <= TOP)
    .map(([kl, g]) => [along(kl), up(g)]));
  const draw = () => {
    const now = world(state), kl = spent(now, state.gamma), gain = gains(now, kl);
    const fit = plots(now), { bias, noise, blur, norm, spread, bend } = now;
    config.draws.forEach(([quality, length, other, luck], i) => {
      const ratio = (quality + bias * length + Math.sqrt(blur) * other) / norm;
      const real = (quality - bend / 2 * (length ** 2 - 1)) / Math.sqrt(1 + bend * bend / 2);
      const said = (quality + bias * length + Math.sqrt(noise) * luck) / Math.sqrt(spread);
      [said, real].forEach((reward, j) => set(marks[i][j], {
        cx: across(math.clamp(ratio, -3, 3)), cy: height(math.clamp(reward, -3.4, 3.4)) }));
    });
    set(best, { d: path(v => gains(now, v).best) });
    set(seen, { d: path(v => gains(now, v).seen) });
    set(truth, { d: path(v => gains(now, v).truth) });
    const at = Math.min(kl, MOST);
    set(knob, { transform: `translate(${along(at)} ${
      up(math.clamp(gains(now, at).truth, -.6, TOP))})` });
    showKnob(kl);
    show.rho(round(correlation(state.accuracy)));
    show.seen(round(fit.seen));
    show.truth(round(fit.truth));
    show.kl(`${round(kl)} nats`);
    show.gain(`${round(gain.truth)} σ`);
    show.share(`${Math.round(100 * gain.truth / gain.best)} %`);
    const fall = turn(now);
    say(`At ${round(kl)} nats the true reward gains ${round(gain.truth)} σ of the `
      + `${round(gain.best)} that are possible, and the seen one ${round(gain.seen)}. `
      + (kl > fall ? `Past ${round(fall)} nats the true reward falls while the seen one rises.`
        : Number.isFinite(fall) ? `The true reward falls from ${round(fall)} nats on.`
          : "More KL never harms here."));
  };
  draw();
});
