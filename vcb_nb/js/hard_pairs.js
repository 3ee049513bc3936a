// Six candidates, their residuals, and how lambda moves the loss's weight to the hardest pair.
VCBX.hardPairs = (() => {
  const { pairs, pairLosses, pairWeights, logMeanExp, mean } = VCBX.math;

  // All pairs, hardest first, with their losses and weights, and the three ways to sum them up.
  const weigh = (residuals, lam) => {
    const losses = pairLosses(residuals), weights = pairWeights(losses, lam);
    const rows = pairs(residuals.length).map(([i, j], k) =>
      ({ i, j, loss: losses[k], weight: weights[k] })).sort((a, b) => b.loss - a.loss);
    return { rows, mean: mean(losses), most: Math.max(...losses),
             lse: lam > 0 ? logMeanExp(losses, lam) : mean(losses) };
  };

  // Half of the pairs' weight lies on how many pairs?
  const half = rows => {
    let total = 0;
    return 1 + rows.findIndex(row => (total += row.weight) >= 0.5);
  };

  // Six residuals from a seed (mulberry32), two decimals, within the drawing.
  const draw = (seed, n, limit) => Array.from({ length: n }, (_, k) => {
    let t = seed * 1000 + k * 0x6D2B79F5 | 0;
    t = Math.imul(t ^ t >>> 15, t | 1);
    t ^= t + Math.imul(t ^ t >>> 7, t | 61);
    return Math.round(((t ^ t >>> 14) >>> 0) / 2 ** 32 * 180 * limit - 90 * limit) / 100;
  });

  return { weigh, half, draw };
})();

VCBX.register("hard_pairs", (root, config) => {
  const { ui } = VCBX, { weigh, half, draw: drawResiduals } = VCBX.hardPairs;
  const { svg, set, round } = ui, { clamp } = VCBX.math;
  const LIMIT = 2, LOW = 0.01, HIGH = 30, TOP_LOSS = (2 * LIMIT) ** 2, CURVE = 60;
  const style = config.methods.vcb_lse, n = config.residuals.length, count = n * (n - 1) / 2;
  // The slider's leftmost place is lambda = 0; from there on lambda grows by equal factors.
  const lamOf = dial => dial > 0 ? LOW * (HIGH / LOW) ** dial : 0;
  const dialOf = lam => lam > 0 ? Math.max(1e-3, Math.log(lam / LOW) / Math.log(HIGH / LOW)) : 0;
  const begin = () => ({ residuals: [...config.residuals], dial: dialOf(config.lam), seed: 0 });
  const lamText = dial => dial > 0 ? +lamOf(dial).toPrecision(2) + "" : "0: mean";
  let state = begin();
  const redraw = ui.schedule(() => draw());
  const color = ui.tint(style.color);
  root.style.setProperty("--vcbx-accent", color);

  // ---- controls
  const controls = ui.row(root, "controls");
  const dial = ui.slider(controls, { label: "Hard pairs λ", min: 0, max: 1, step: "any",
    value: state.dial,
    format: lamText, onInput: v => { state.dial = v; redraw(); } });
  const buttons = ui.row(controls, "buttons");
  ui.button(buttons, { label: "Other residuals", onClick: () => {
    state.residuals = drawResiduals(++state.seed, n, LIMIT);
    redraw();
  } });
  ui.button(buttons, { label: "Reset", onClick: () => {
    state = begin();
    dial.set(state.dial);
    redraw();
  } });
  const say = ui.announcer(root);

  // ---- residuals, with every pair drawn as a line as thick as its weight
  const panels = ui.row(root), left = ui.el("div");
  left.style.cssText = "flex:1 1 310px;max-width:455px;min-width:0";
  panels.append(left);
  const board = ui.panel(left, { width: 350, height: 250, max: 1.3,
                                 label: "Residuals of the candidates, and their pairs" });
  const across = ui.scale(0.5, n + 0.5, 46, 340), up = ui.scale(-LIMIT, LIMIT, 206, 30);
  ui.axis(board, { side: "bottom", at: 206, scale: across, label: "candidate",
                   values: config.residuals.map((_, i) => i + 1), format: x => `${x}` });
  ui.axis(board, { side: "left", at: 46, scale: up, values: [-2, -1, 0, 1, 2], grid: 340,
                   label: "residual eᵢ = γ ℓᵢ − rᵢ/σ (units of σ)" });
  const links = Array.from({ length: count }, () => {
    const node = svg("line", { "stroke-linecap": "round" });
    node.style.stroke = color;
    board.append(node);
    return node;
  });
  const dots = config.residuals.map((_, i) => {
    const node = svg("g", {}, svg("circle", { r: 16, fill: "transparent" }),
                     svg("circle", { r: 7, stroke: "currentColor", "stroke-width": 1.6 }));
    node.lastChild.style.fill = color;
    const show = ui.handle(node, { label: `residual of candidate ${i + 1}`, min: -LIMIT, max: LIMIT,
      step: 0.05, get: () => state.residuals[i], onInput: e => move(i, e) });
    ui.drag(node, ({ y }) => move(i, up.invert(y)));
    board.append(node);
    return { node, show };
  });

  // ---- the loss against lambda
  const graph = ui.panel(left, { width: 350, height: 190, max: 1.3, label: "The loss against λ" });
  const along = ui.scale(0, 1, 46, 340);
  let rise = ui.scale(0, TOP_LOSS, 146, 30);
  const lossAxis = ui.axis(graph, { side: "left", at: 46, scale: rise, count: 4,
                                    label: "loss: LogSumExp of the pair losses" });
  const powers = [0.1, 1, 10].map(dialOf);
  ui.axis(graph, { side: "bottom", at: 146, scale: along, values: [0, ...powers],
                   label: "λ (log scale, 0 at the left end)",
                   format: dial => `${+lamOf(dial).toPrecision(2)}` });
  const level = name => {
    const line = svg("line", { x1: 46, x2: 340, stroke: "currentColor", "stroke-dasharray": "2 4",
                               "stroke-width": 1.4 });
    const text = svg("text", { x: 338, "text-anchor": "end" });
    graph.append(line, text);
    return { line, text, name };
  };
  const levels = { most: level("hardest pair"), mean: level("mean") };
  const curve = svg("polyline", { fill: "none", "stroke-width": 2.6 });
  const here = svg("path", { d: ui.marker(style.marker, 7), stroke: "currentColor",
                             "stroke-width": 1.4 });
  curve.style.stroke = here.style.fill = color;
  graph.append(curve, here);

  // ---- the pairs' weights, hardest first
  const STEP = 22, HEAD = 48, FOOT = HEAD + STEP * count;
  const chart = ui.panel(panels, { width: 350, height: FOOT + 42, max: 1.3,
                                   label: "Weights of the pairs, hardest first" });
  const wide = ui.scale(0, 1, 112, 308);
  ui.axis(chart, { side: "bottom", at: FOOT, scale: wide, values: [0, .25, .5, .75, 1], grid: HEAD,
                   label: "weight of the pair in the gradient", format: x => `${x}` });
  chart.append(svg("text", { x: 10, y: 34, text: "pair" }),
               svg("text", { x: 100, y: 34, text: "loss ℒᵢⱼ", "text-anchor": "end" }));
  const uniform = wide(1 / count);
  chart.append(svg("line", { x1: uniform, x2: uniform, y1: HEAD - 6, y2: FOOT, class: "vcbx-line",
                             "stroke-dasharray": "2 3" }),
               svg("text", { x: uniform - 6, y: 34,
                             text: `dotted: 1/${count} each, the plain mean` }));
  const bars = Array.from({ length: count }, (_, k) => {
    const y = HEAD + STEP * k, bar = svg("rect", { x: wide(0), y: y + 3, height: STEP - 6, rx: 2 });
    bar.style.fill = color;
    const text = { y: y + STEP / 2 + 4.5 };
    const node = { bar, pair: svg("text", { ...text, x: 10 }),
                   loss: svg("text", { ...text, x: 100, "text-anchor": "end" }),
                   weight: svg("text", { ...text }) };
    chart.append(...Object.values(node));
    return node;
  });

  // ---- drawing
  const weightText = w => w < 0.0005 ? "< 0.001" : round(w, w < 0.1 ? 3 : 2);
  const drawPairs = ({ rows }) => rows.forEach(({ i, j, loss, weight }, k) => {
    const { bar, ...texts } = bars[k], { residuals } = state;
    set(bar, { width: (wide(weight) - wide(0)).toFixed(2) });
    set(texts.pair, { text: `${i + 1} and ${j + 1}` });
    set(texts.loss, { text: round(loss) });
    set(texts.weight, { x: (wide(weight) + 6).toFixed(1),
                        text: weightText(weight) });
    set(links[k], { x1: across(i + 1), x2: across(j + 1), y1: up(residuals[i]).toFixed(1),
                    y2: up(residuals[j]).toFixed(1), "stroke-width": (0.4 + 16 * weight).toFixed(2),
                    "stroke-opacity": (0.2 + 0.7 * Math.sqrt(weight)).toFixed(3) });
  });
  const drawCurve = ({ mean, most, lse }) => {
    const top = Math.min(TOP_LOSS, 2 ** Math.max(0, Math.ceil(Math.log2(most || 1))));
    if (top !== rise.domain[1]) lossAxis.update({ scale: rise = ui.scale(0, top, 146, 30) });
    const points = Array.from({ length: CURVE + 1 }, (_, k) => {
      const loss = weigh(state.residuals, lamOf(Math.max(k / CURVE, 1e-9))).lse;
      return `${along(k / CURVE).toFixed(1)},${rise(loss).toFixed(1)}`;
    });
    set(curve, { points: points.join(" ") });
    set(here, { transform: `translate(${along(state.dial).toFixed(1)} ${rise(lse).toFixed(1)})` });
    for (const [key, value] of Object.entries({ most, mean })) {
      const { line, text, name } = levels[key], y = rise(value);
      set(line, { y1: y.toFixed(1), y2: y.toFixed(1) });
      set(text, { y: (y - 6).toFixed(1), text: `${name} ${round(value)}` });
    }
  };
  const words = ({ rows, mean, most, lse }) => {
    const [top] = rows, name = `${top.i + 1} and ${top.j + 1}`, lam = lamOf(state.dial);
    if (most < 1e-12) return "All residuals are equal: every pair is calibrated and the loss is 0.";
    if (!lam) return `λ = 0: the loss is the plain mean, ${round(mean)}. Each of the ${count} `
      + `pairs has the weight 1/${count}, however large its loss.`;
    const many = half(rows);
    return `λ = ${lamText(state.dial)}: the loss is ${round(lse)}, between the mean of `
      + `${round(mean)} and the hardest pair’s ${round(most)}. The hardest pair, ${name}, has `
      + `${Math.round(100 * top.weight)}% of the weight`
      + (many > 1 ? `; half of the weight lies on ${many} of ${count} pairs.` : ".");
  };
  const draw = () => {
    const found = weigh(state.residuals, lamOf(state.dial));
    drawPairs(found);
    drawCurve(found);
    dots.forEach(({ node, show }, i) => {
      const e = state.residuals[i];
      set(node, { transform: `translate(${across(i + 1)} ${up(e).toFixed(1)})` });
      show(e);
    });
    say(words(found));
  };
  const move = (i, e) => {
    state.residuals[i] = Math.round(100 * clamp(e, -LIMIT, LIMIT)) / 100;
    redraw();
  };

  draw();
});
