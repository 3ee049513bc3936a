// Rewards of any skew and scale: what VCB's optimum spends, and what dividing by sigma equalises.
VCBX.scaleShape = (() => {
  // Standardised rewards with a shifted gamma distribution: mean 0, deviation 1, this skewness;
  // mirrored if it is negative, Gaussian at 0. With k = 4/skew^2 and a = sqrt(k), the cumulant
  // generating function is -a t - k log(1 - t/a), for t < a.
  const split = skew => ({ sign: skew < 0 ? -1 : 1, a: 2 / Math.abs(skew), k: 4 / skew ** 2 });

  // What the tilt exp(t z) spends, in nats, t k'(t) - k(t), and gains, k'(t); both infinite from
  // the t on where the expectation of exp(t z) is.
  const tilt = (skew, t) => {
    if (Math.abs(skew) < 1e-6) return { kl: t * t / 2, gain: t };
    const { sign, a, k } = split(skew), u = sign * t / a;
    if (u >= 1) return { kl: Infinity, gain: Infinity };
    return { kl: k * (u / (1 - u) + Math.log1p(-u)), gain: t / (1 - u) };
  };
  // The optimum's divergence from the SFT policy at gamma, and its series' first terms.
  const spent = (skew, gamma) => tilt(skew, 1 / gamma).kl;
  const terms = (skew, gamma) => ({ gaussian: .5 / gamma ** 2, third: skew / (3 * gamma ** 3),
                                    fourth: 1.5 * skew ** 2 / (8 * gamma ** 4) });

  // Log-density of z under SFT (t = 0) or tilted by exp(t z), which is of the same family.
  const LANCZOS = [76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155,
                   .1208650973866179e-2, -.5395239384953e-5];
  const logGamma = x => {
    const base = x + 5.5, series = LANCZOS.reduce((s, c, j) => s + c / (x + j + 1),
                                                  1.000000000190015);
    return (x + .5) * Math.log(base) - base + Math.log(2.5066282746310005 * series / x);
  };
  const logDensity = (skew, t, z) => {
    if (Math.abs(skew) < 1e-6) return -.5 * (z - t) ** 2 - .5 * Math.log(2 * Math.PI);
    const { sign, a, k } = split(skew), y = a * a + a * sign * z; // a gamma variate of rate 1
    const rate = 1 - sign * t / a;
    if (y < 0 || rate <= 0) return -Infinity;
    const power = k === 1 ? 0 : (k - 1) * Math.log(y); // 0 log 0 is 0 here
    return Math.log(a) + k * Math.log(rate) + power - rate * y - logGamma(k);
  };

  return { tilt, spent, terms, logDensity };
})();

VCBX.register("scale_shape", (root, config) => {
  const { math, ui } = VCBX, { tilt, spent, terms, logDensity } = VCBX.scaleShape;
  const { svg, set, round } = ui, { vcb, sft, optimum } = config.methods;
  const [low, high] = config.range, W = 390, H = 290, bottom = H - 46;
  const begin = () => ({ skew: config.skew, scale: config.scale, gamma: config.gamma });
  let state = begin();
  const redraw = ui.schedule(() => draw());
  const violet = ui.tint(vcb.color), grey = ui.tint(sft.color);

  // ---- the rewards before and after ----
  const panels = ui.row(root);
  const left = ui.panel(panels, { width: W, height: H,
                                  label: "Density of the rewards under the SFT policy and π*" });
  left.append(svg("text", { x: 0, y: 14, class: "vcbx-heading", text: "Rewards of one prompt" }));
  const x = ui.scale(-6, 10, 14, W - 8), TOP = 78, POINTS = 640;
  ui.axis(left, { side: "bottom", at: bottom, scale: x, values: [-6, -4, -2, 0, 2, 4, 6, 8, 10],
                  label: "reward r − mean (units of r)" });
  const before = svg("path", { fill: "currentColor", "fill-opacity": .12, stroke: grey,
                               "stroke-width": 2, "stroke-dasharray": "5 3" });
  const after = svg("path", { fill: "none", "stroke-width": 2.6 });
  after.style.stroke = violet;
  const spread = svg("line", { stroke: "currentColor", "stroke-width": 1.6 });
  const spreadText = svg("text", { "text-anchor": "middle" });
  left.append(before, after, spread, spreadText);
  const dash = attrs => svg("path", { d: "M0 7h22", fill: "none", ...attrs });
  const none = svg("text", { x: W - 126, y: 60, class: "vcbx-note", text: "π* does not exist" });
  left.append(none);

  // ---- the cost against 1/gamma ----
  const right = ui.panel(panels, { width: W, height: H,
                                   label: "KL that the optimum spends, against 1/γ" });
  right.append(svg("text", { x: 0, y: 14, class: "vcbx-heading",
                             text: "What the optimum spends" }));
  const across = ui.scale(0, 1 / low, 44, W - 10), MOST = 6, up = ui.scale(0, MOST, bottom, 46);
  ui.axis(right, { side: "left", at: 44, scale: up, grid: W - 10, dx: -44,
                   label: "KL(π* ‖ SFT) (nats)" });
  ui.axis(right, { side: "bottom", at: bottom, scale: across, values: [0, .5, 1, 1.5, 2],
                   format: t => t ? `${t}` : "0", label: "1/γ (weak pull on the right)" });
  const curve = attrs => {
    const node = svg("path", { fill: "none", ...attrs });
    right.append(node);
    return node;
  };
  const GAUSS = { stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "2 3" };
  const CUBIC = { stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "8 4" };
  const gaussian = curve(GAUSS), cubic = curve(CUBIC), exact = curve({ "stroke-width": 2.6 });
  exact.style.stroke = violet;
  const wall = curve({ stroke: "currentColor", "stroke-opacity": .45 });
  const knob = svg("g", {}, svg("circle", { r: 20, fill: "transparent" }),
                   svg("circle", { r: 8, stroke: "currentColor", "stroke-width": 1.5 }));
  knob.lastChild.style.fill = violet;
  right.append(knob);
  const keys = ui.el("p", { class: "vcbx-key" });
  const legend = (attrs, text) => {
    const shape = dash(attrs);
    keys.append(ui.el("span", {},
                      svg("svg", { width: 22, height: 14, "aria-hidden": "true" }, shape), text));
    return shape;
  };
  legend({ stroke: grey, "stroke-width": 2, "stroke-dasharray": "5 3" }, "SFT policy");
  legend({ "stroke-width": 2.6 }, "optimum π*, exact").style.stroke = violet;
  legend(GAUSS, "1/(2γ²), the cost of Gaussian rewards");
  legend(CUBIC, "1/(2γ²) + skewness/(3γ³)");
  root.append(keys);

  // ---- numbers and controls ----
  const facts = ui.row(root, "facts");
  const show = { kl: ui.fact(facts, "KL(π* ‖ SFT), exact"), gauss: ui.fact(facts, "1/(2γ²)"),
                 cubic: ui.fact(facts, "… + skewness/(3γ³)"), skew: ui.fact(facts, "skewness"),
                 fixed: ui.fact(facts, "KL without σ: tilt exp(r/γ)") };
  const controls = ui.row(root, "controls");
  const shapes = ui.fieldset(controls, "The prompt's rewards");
  const change = key => value => { state[key] = value; redraw(); };
  const skew = ui.slider(shapes, { label: "skewness", min: -2, max: 2, step: .05,
    value: state.skew, onInput: change("skew") });
  const scale = ui.slider(shapes, { label: "scale σ(x)", min: .5, max: 2, step: .05,
    value: state.scale, onInput: change("scale") });
  const strength = ui.fieldset(controls, "Strength of the pull to the SFT policy");
  const setGamma = gamma => {
    state.gamma = math.clamp(gamma, low, high);
    slider.set(state.gamma);
    redraw();
  };
  const slider = ui.slider(strength, { label: "γ", min: low, max: high, log: true,
                                       value: state.gamma, onInput: setGamma });
  ui.button(ui.row(strength, "buttons"), { label: "Reset", onClick: () => {
    state = begin();
    skew.set(state.skew);
    scale.set(state.scale);
    setGamma(state.gamma);
  } });
  const say = ui.announcer(root);
  ui.drag(knob, p => setGamma(1 / math.clamp(across.invert(p.x), 1 / high, 1 / low)));
  const showKnob = ui.handle(knob, { label: "Point on the curve of the cost, by 1/γ",
    min: 1 / high, max: 1 / low, step: .02, get: () => 1 / state.gamma,
    text: t => `1/γ = ${round(t)}`, onInput: t => setGamma(1 / t) });

  // ---- one draw ----
  const nats = v => Number.isFinite(v) ? `${round(v)} nats` : "infinite";
  const line = points => "M" + points.map(p => p.map(v => v.toFixed(1)).join(" ")).join("L");
  const grid = Array.from({ length: POINTS + 1 }, (_, i) => -6 + 16 * i / POINTS);
  const density = t => grid.map(r => Math.exp(logDensity(state.skew, t, r / state.scale)));
  // Areas under a curve: the higher of the two reaches the top.
  const area = (values, top) => line([[x(-6), bottom], ...values.map((d, i) =>
    [x(grid[i]), bottom - (bottom - TOP) * d / top]), [x(10), bottom]]);
  const costs = cost => {
    const points = [];
    for (let i = 0; i <= 200; i++) {
      const t = i / 200 / low, kl = cost(Math.max(t, 1e-9));
      if (!(kl <= MOST)) break;
      if (kl >= 0) points.push([across(t), up(kl)]);
    }
    return line(points);
  };
  const draw = () => {
    const { skew: shape, scale: sigma, gamma } = state, t = 1 / gamma;
    const kl = spent(shape, gamma), fixed = spent(shape, gamma / sigma);
    const parts = terms(shape, gamma);
    const end = shape > 0 ? 2 / shape : Infinity, finite = Number.isFinite(kl);
    const sftDensity = density(0), piDensity = finite ? density(t) : [0];
    const top = Math.max(...sftDensity, ...piDensity);
    set(before, { d: area(sftDensity, top) });
    set(after, { d: finite ? area(piDensity, top) : "" });
    set(none, { visibility: finite ? "hidden" : "visible" });
    set(spread, { x1: x(0), x2: x(sigma), y1: TOP - 14, y2: TOP - 14 });
    set(spreadText, { x: x(sigma / 2), y: TOP - 20, text: "σ" });
    set(exact, { d: costs(v => spent(shape, 1 / v)) });
    set(gaussian, { d: costs(v => v * v / 2) });
    set(cubic, { d: costs(v => v * v / 2 + shape * v ** 3 / 3) });
    const seen = end <= 1 / low;
    set(wall, { visibility: seen ? "visible" : "hidden", d: seen
      ? `M${across(end)} ${bottom}V46` : "" });
    set(knob, { transform: `translate(${across(t)} ${up(Math.min(kl, MOST))})` });
    showKnob(t);
    show.kl(nats(kl));
    show.gauss(nats(parts.gaussian));
    show.cubic(nats(parts.gaussian + parts.third));
    show.skew(round(shape));
    show.fixed(nats(fixed));
    const compare = Math.abs(kl - parts.gaussian) < .005 ? "as 1/(2γ²) says"
      : `${kl > parts.gaussian ? "more" : "less"} than the ${nats(parts.gaussian)} of `
        + "Gaussian rewards";
    const other = Math.abs(sigma - 1) < .001 ? "" : ` The scale σ = ${round(sigma)} has no effect `
      + `on it; without the division by σ the cost would be ${nats(fixed)}.`;
    say(finite ? `At γ = ${round(gamma)} rewards of skewness ${round(shape)} cost ${nats(kl)}, `
      + `${compare}, for ${round(tilt(shape, t).gain * sigma)} more reward.${other}`
      : `At γ = ${round(gamma)} the upper tail of the rewards outweighs the pull: no optimum `
        + "exists. Of finitely many responses the best one would take all the probability.");
  };
  draw();
});
