// Three candidates, best first, have two free log-ratio gaps: x = l1 - l2 and y = l2 - l3 (nats).
// The SFT policy is uniform over the three, so that losses without a reference have a map too.
VCBX.landscape = (() => {
  const { softplus, pairWeights, logMeanExp, std } = VCBX.math;
  const STEPS = 3000, MEAN = [1 / 3, 1 / 3, 1 / 3];

  // One pair's loss and its slope, as functions of the pair's gap d and its number k.
  const TERMS = {
    vcb: ({ gamma }, targets) => [
      (d, k) => (gamma * (d - targets[k])) ** 2,
      (d, k) => 2 * gamma ** 2 * (d - targets[k])],
    dpo: ({ beta }) => [d => softplus(-beta * d), d => -beta / (1 + Math.exp(beta * d))],
    ipo: ({ tau }) => [d => (d - 0.5 / tau) ** 2, d => 2 * (d - 0.5 / tau)],
    slic: ({ delta }) => [d => Math.max(0, delta - d), d => d < delta ? -1 : 0],
    rrhf: ({ rank_weight: w }) => [ // a sum over pairs: 3 times their mean
      d => 3 * w * Math.max(0, -d), d => d < 0 ? -3 * w : 0],
  };
  TERMS.vcb_lse = TERMS.vcb;
  const DEFAULTS = { gamma: 1, lam: 1, beta: 0.1, tau: 0.1, delta: 1, lam_reg: 0.1,
                     rank_weight: 1 };
  const BEST_WEIGHT = { slic: p => p.lam_reg, rrhf: () => 1 }; // of -log pi(best)
  // The largest curvature along the logits; for a loss that is piecewise linear, a pace.
  const CURVATURE = {
    vcb: p => 2 * p.gamma ** 2, vcb_lse: p => 4 * p.gamma ** 2, dpo: p => p.beta ** 2 / 4,
    ipo: () => 2, slic: () => 1, rrhf: () => 1,
  };

  // The gaps of the pairs (1,2), (2,3), (1,3) that VCB asks for.
  const vcbTargets = ([r1, r2, r3], gamma, sigma) =>
    [r1 - r2, r2 - r3, r1 - r3].map(gap => gap / (gamma * sigma));
  const minimum = (method, params, targets) => method.startsWith("vcb") ? targets.slice(0, 2)
    : method === "ipo" ? [1 / (3 * params.tau), 1 / (3 * params.tau)] : null;

  // A method's map: value(x, y), gradient(x, y) -> [d/dx, d/dy], minimum [x, y] or null, and the
  // step of its descent.
  const landscape = (method, options, rewards) => {
    const params = { ...DEFAULTS, ...options };
    const targets = vcbTargets(rewards, params.gamma, params.sigma || std(rewards));
    const [term, slope] = TERMS[method](params, targets);
    const best = method in BEST_WEIGHT ? BEST_WEIGHT[method](params) : 0;
    const lam = method === "vcb_lse" ? params.lam : 0;
    const value = (x, y) => {
      const a = term(x, 0), b = term(y, 1), c = term(x + y, 2);
      const pairs = lam > 0 ? logMeanExp([a, b, c], lam) : (a + b + c) / 3;
      return best ? pairs + best * Math.log1p(Math.exp(-x) + Math.exp(-x - y)) : pairs;
    };
    const gradient = (x, y) => {
      const w = lam > 0 ? pairWeights([term(x, 0), term(y, 1), term(x + y, 2)], lam) : MEAN;
      const both = w[2] * slope(x + y, 2);
      const p2 = 1 / (1 + Math.exp(x) + Math.exp(-y)), p3 = p2 * Math.exp(-y);
      return [w[0] * slope(x, 0) + both - best * (p2 + p3), w[1] * slope(y, 1) + both - best * p3];
    };
    return { value, gradient, minimum: minimum(method, params, targets),
             step: 0.01 / CURVATURE[method](params) };
  };

  // Gradient descent on the policy's three logits, seen in the two gaps: [[x, y], ...].
  const descend = ({ gradient, step }, [x, y], steps = STEPS) => {
    const trail = [[x, y]];
    for (let k = 0; k < steps; k++) {
      const [gx, gy] = gradient(x, y);
      x -= step * (2 * gx - gy);
      y -= step * (2 * gy - gx);
      trail.push([x, y]);
    }
    return trail;
  };

  // The loss on n x n points, lowest y first, as heights from 0 (least on the map) to 1. The root
  // spaces a bowl's contours evenly.
  const heights = (value, [low, high], n) => {
    const grid = new Float64Array(n * n), at = k => low + (high - low) * k / (n - 1);
    let least = Infinity, most = -Infinity;
    for (let k = 0; k < grid.length; k++) {
      const z = grid[k] = value(at(k % n), at(Math.floor(k / n)));
      if (z < least) least = z;
      if (z > most) most = z;
    }
    const scale = 1 / (most - least || 1);
    for (let k = 0; k < grid.length; k++) grid[k] = Math.sqrt((grid[k] - least) * scale);
    return { grid, least, most };
  };

  // line(x0, y0, x1, y1), in steps of the grid, for each piece of the contours at k/levels.
  const contours = (grid, n, levels, line) => {
    const cut = (a, b, t) => (t - a) / (b - a);
    const cell = (i, j, [a, b, c, d], t) => { // counter-clockwise from the lower left
      const found = [];
      if ((a < t) !== (b < t)) found.push(i + cut(a, b, t), j);
      if ((b < t) !== (c < t)) found.push(i + 1, j + cut(b, c, t));
      if ((d < t) !== (c < t)) found.push(i + cut(d, c, t), j + 1);
      if ((a < t) !== (d < t)) found.push(i, j + cut(a, d, t));
      for (let k = 0; k + 3 < found.length; k += 4) line(...found.slice(k, k + 4));
    };
    for (let j = 0; j + 1 < n; j++) for (let i = 0; i + 1 < n; i++) {
      const k = j * n + i, corners = [grid[k], grid[k + 1], grid[k + n + 1], grid[k + n]];
      const last = Math.max(...corners) * levels;
      for (let m = Math.floor(Math.min(...corners) * levels) + 1; m <= last; m++)
        cell(i, j, corners, m / levels);
    }
  };

  // Where the descent ended, in words.
  const verdict = (method, params, rewards, [x, y], label, inside) => {
    const num = VCBX.ui.round, steps = `After ${STEPS.toLocaleString("en")} steps`;
    const gaps = `${num(x)} and ${num(y)} nats`, [r1, r2, r3] = rewards;
    const asked = `${num(r1 - r2)} and ${num(r2 - r3)}`;
    const where = inside ? "" : ", off the map,";
    return {
      vcb: () => `${label} stops at gaps of ${gaps}, in proportion to the reward gaps of ${asked}: `
        + "(r₁\u00a0−\u00a0r₂)/(γσ) and (r₂\u00a0−\u00a0r₃)/(γσ).",
      ipo: () => `${label} stops at ${gaps}: equal gaps, though the reward gaps are ${asked}. `
        + "It saw their order only.",
      dpo: () => `${steps} ${label}’s gaps are ${gaps}${where} and still growing: the loss `
        + "falls for ever, and has no policy to stop at.",
      slic: () => `${steps} ${label}’s gaps are ${gaps}${where}: `
        + (Math.min(x, y) > params.delta - 0.05 ? `each reaches the margin of ${num(params.delta)}`
          : `they are on their way to the margin of ${num(params.delta)}`)
        + ", whatever the rewards; what is left raises the best response’s likelihood for ever.",
      rrhf: () => `${steps} ${label}’s gaps are ${gaps}${where}: its ranking term asks for the `
        + "order alone, so nothing parts the second from the third; the best response’s "
        + "likelihood grows for ever.",
    }[method === "vcb_lse" ? "vcb" : method]();
  };

  return { landscape, descend, heights, contours, verdict, STEPS };
})();

VCBX.register("loss_landscape", (root, config) => {
  const { ui } = VCBX, { landscape, descend, heights, contours, verdict } = VCBX.landscape;
  const { el, svg, set, round } = ui;
  const WIDTH = 356, HEIGHT = 376, LEFT = 40, TOP = 30, SIZE = 306, GRID = 65, LEVELS = 14;
  const DOMAIN = [-2, 6], PIXELS = 612, FRAMES = 400, SECONDS = 1.8;
  const { strengths } = config;
  const across = ui.scale(...DOMAIN, LEFT, LEFT + SIZE);
  const up = ui.scale(...DOMAIN, TOP + SIZE, TOP);
  const at = ([x, y]) => `translate(${across(x).toFixed(2)} ${up(y).toFixed(2)})`;
  const onMap = ([x, y]) => Math.min(x, y) >= DOMAIN[0] && Math.max(x, y) <= DOMAIN[1];

  // ---- state
  const methods = Object.keys(strengths);
  const begin = () => ({
    method: config.method, rewards: [...config.rewards], start: [0, 0], trails: {},
    lam: config.lam,
    strengths: Object.fromEntries(methods.map(m => [m, strengths[m].value])),
  });
  let state = begin(), map, sentence = "", playing = 0, painted = "";
  const params = () => ({ [strengths[state.method].param]: state.strengths[state.method],
                          lam: state.lam });
  const now = () => landscape(state.method, params(), state.rewards);
  const style = (method = state.method) => config.methods[method];

  // ---- drawing: what stands
  const panels = ui.row(root), frame = el("div"), side = el("div");
  frame.style.cssText = `position:relative;flex:1 1 320px;max-width:${WIDTH * 1.3}px`;
  side.style.cssText = "flex:1 1 280px;min-width:0;max-width:480px";
  panels.append(frame, side);
  const canvas = el("canvas", { width: PIXELS, height: PIXELS, "aria-hidden": "true" });
  const part = (x, of) => `${100 * x / of}%`;
  // The transition tells of a change of theme: the page's colour reaches a canvas in no other way.
  canvas.style.cssText = `position:absolute;left:${part(LEFT, WIDTH)};top:${part(TOP, HEIGHT)};`
    + `width:${part(SIZE, WIDTH)};height:${part(SIZE, HEIGHT)};transition:color 1ms`;
  frame.append(canvas);
  const board = ui.panel(frame, { width: WIDTH, height: HEIGHT, max: 1.3,
                                  label: "Map of the loss over the two log-ratio gaps" });
  board.style.position = "relative";
  ui.axis(board, { side: "bottom", at: TOP + SIZE, scale: across, values: [-2, 0, 2, 4, 6],
                   label: "ℓ₁ − ℓ₂: best over second (nats)" });
  ui.axis(board, { side: "left", at: LEFT, scale: up, values: [-2, 0, 2, 4, 6],
                   label: "ℓ₂ − ℓ₃: second over third (nats)" });
  const field = svg("rect", { x: LEFT, y: TOP, width: SIZE, height: SIZE, fill: "transparent",
                              stroke: "currentColor", "stroke-opacity": .25 });
  const ink = { stroke: "currentColor", fill: "none" };
  const RAY = { ...ink, "stroke-width": 1.5, "stroke-dasharray": "7 4" };
  const EQUAL = { ...ink, "stroke-width": 1.5, "stroke-dasharray": "1.5 4",
                  "stroke-linecap": "round" };
  const ray = svg("line", RAY), equal = svg("line", { ...EQUAL, x1: across(0), y1: up(0),
                                                      x2: across(6), y2: up(6) });
  const STAR = { d: ui.marker("*", 8), fill: "currentColor" };
  const star = svg("path", STAR);
  const RING = { r: 8, fill: "currentColor", "fill-opacity": .12, stroke: "currentColor",
                 "stroke-width": 2 };
  const ring = svg("g", {}, svg("circle", { r: 16, fill: "transparent" }), svg("circle", RING));
  const paths = svg("g");
  board.append(field, ray, equal, paths, star, ring);
  const trailOf = Object.fromEntries(methods.map(m => {
    const color = ui.tint(style(m).color), line = svg("polyline", { fill: "none" });
    const casing = svg("polyline", { ...ink, "stroke-width": 5, "stroke-opacity": .75,
                                       "stroke-linejoin": "round" });
    const dot = svg("path", { d: ui.marker(style(m).marker, 6) }), arrow = svg("path",
      { d: "M-9 -6L5 0L-9 6Z" });
    line.style.cssText = `stroke:${color};stroke-width:3;stroke-linejoin:round`;
    for (const head of [dot, arrow]) {
      head.style.cssText = `fill:${color};stroke:currentColor;stroke-width:1.2`;
      set(head, { visibility: "hidden" });
    }
    const name = svg("text", { text: style(m).label });
    const group = svg("g", {}, casing, line, dot, arrow);
    paths.append(group, name);
    return [m, { group, casing, line, dot, arrow, name }];
  }));

  // ---- the heat and its contours: only when the loss has changed
  const small = el("canvas", { width: GRID, height: GRID });
  const paint = () => {
    const { grid, least, most } = heights(map.value, DOMAIN, GRID), pen = canvas.getContext("2d");
    const brush = small.getContext("2d"), image = brush.createImageData(GRID, GRID);
    for (let j = 0; j < GRID; j++) for (let i = 0; i < GRID; i++)
      image.data[4 * ((GRID - 1 - j) * GRID + i) + 3] = 165 * grid[j * GRID + i] ** 1.3;
    brush.putImageData(image, 0, 0);
    const cell = PIXELS / (GRID - 1), y = j => PIXELS - j * cell;
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, PIXELS, PIXELS);
    pen.drawImage(small, -cell / 2, -cell / 2, GRID * cell, GRID * cell);
    pen.beginPath();
    contours(grid, GRID, LEVELS, (x0, y0, x1, y1) => {
      pen.moveTo(x0 * cell, y(y0));
      pen.lineTo(x1 * cell, y(y1));
    });
    pen.globalAlpha = .6;
    pen.lineWidth = 1.8;
    pen.stroke();
    pen.globalAlpha = 1;
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = getComputedStyle(swatch).borderTopColor; // a canvas needs plain numbers
    pen.fillRect(0, 0, PIXELS, PIXELS);
    set(low, { text: round(least) });
    set(high, { text: round(most) });
  };

  const NOWHERE = { visibility: "hidden", "text-anchor": "start", transform: "" };
  // Beside the trail's end, towards the side that has room; VCB and its LogSumExp end together.
  const placeOf = (method, [x, y]) => {
    const before = method === "vcb" || x > 4.6, lift = method === "vcb_lse" ? -7 : 4.5;
    return { visibility: "visible", "text-anchor": before ? "end" : "start",
             transform: `translate(${across(x) + (before ? -11 : 11)} ${up(y) + lift})` };
  };
  // Where a trail leaves the map, and its direction there.
  const heading = (from, to) => {
    const turn = Math.atan2(from[1] - to[1], to[0] - from[0]) * 180 / Math.PI;
    return `${at(from)} rotate(${turn.toFixed(1)})`;
  };
  const show = (node, transform) =>
    set(node, { visibility: transform ? "visible" : "hidden", transform });

  const drawTrail = method => {
    const trail = state.trails[method], { group, casing, line, dot, arrow, name } = trailOf[method];
    const seen = trail ? trail.points.slice(0, trail.shown) : [], inside = seen.filter(onMap);
    const done = trail && seen.length === trail.points.length;
    const gone = done && !onMap(seen.at(-1));
    const points = inside.map(([x, y]) => `${across(x).toFixed(1)},${up(y).toFixed(1)}`).join(" ");
    set(casing, { points });
    set(line, { points });
    set(group, { opacity: method === state.method ? 1 : .6 });
    set(name, done ? placeOf(method, inside.at(-1)) : NOWHERE);
    show(dot, inside.length && !gone ? at(inside.at(-1)) : "");
    show(arrow, gone ? heading(...seen.slice(-2)) : "");
  };

  const drawMarks = () => {
    const [r1, r2, r3] = state.rewards, far = DOMAIN[1] / Math.max(r1 - r2, r2 - r3);
    set(ray, { x1: across(0), y1: up(0), x2: across(far * (r1 - r2)), y2: up(far * (r2 - r3)) });
    set(star, map.minimum ? { visibility: "visible", transform: at(map.minimum) }
      : { visibility: "hidden" });
    const [x, y] = state.start, text = `${round(x)} and ${round(y)} nats`;
    set(ring, { transform: at(state.start), "aria-valuenow": +x.toFixed(2),
                "aria-valuetext": `gaps ${text}` });
  };

  const draw = () => {
    map = now();
    const color = ui.tint(style().color);
    root.style.setProperty("--vcbx-accent", color);
    swatch.style.border = `1px solid ${color}`;
    swatch.style.background = `linear-gradient(90deg, transparent, ${color})`;
    const key = JSON.stringify([state.method, params(), state.rewards]);
    if (key !== painted) paint();
    painted = key;
    drawMarks();
    methods.forEach(drawTrail);
    say(sentence || standing());
  };
  const redraw = ui.schedule(draw);
  canvas.addEventListener("transitionend", () => {
    painted = "";
    redraw();
  });

  // ---- words
  const standing = () => {
    const [x, y] = state.start, loss = round(map.value(x, y));
    const lowest = map.minimum ? `its lowest point is at gaps of ${round(map.minimum[0])} and `
      + `${round(map.minimum[1])} nats` : "it has no lowest point";
    return `${style().label} costs ${loss} at the start, gaps of ${round(x)} and ${round(y)} nats; `
      + `${lowest}.`;
  };

  // ---- descent
  const finish = trail => {
    trail.shown = trail.points.length;
    sentence = verdict(state.method, params(), state.rewards, trail.end, style().label,
                       onMap(trail.end));
    redraw();
  };
  // The descent up to where it leaves the map for good, thinned to what a drawing needs.
  const trace = () => {
    const all = descend(now(), state.start), end = all.at(-1);
    const kept = onMap(end) ? all : all.slice(0, all.findIndex(p => !onMap(p)) + 1);
    const every = Math.ceil(kept.length / FRAMES);
    const points = kept.filter((_, k) => k % every === 0 || k === kept.length - 1);
    return { points, shown: 1, end };
  };
  const run = () => {
    cancelAnimationFrame(playing);
    const trail = state.trails[state.method] = trace(), { points } = trail;
    if (ui.still()) return finish(trail);
    const first = performance.now();
    sentence = `${style().label} descends …`;
    const frameOf = time => {
      const share = VCBX.math.clamp((time - first) / 1000 / SECONDS, 0, 1);
      trail.shown = Math.max(1, Math.ceil(share * points.length));
      if (trail.shown === points.length) return finish(trail);
      redraw();
      playing = requestAnimationFrame(frameOf);
    };
    playing = requestAnimationFrame(frameOf);
  };
  // What is on its way no longer belongs to the map: forget these methods' trails.
  const clear = (gone = methods) => {
    cancelAnimationFrame(playing);
    gone.forEach(m => delete state.trails[m]);
    sentence = "";
    redraw();
  };
  const moveTo = (x, y) => {
    const keep = v => Math.round(100 * VCBX.math.clamp(v, ...DOMAIN)) / 100;
    state.start = [keep(x), keep(y)];
    clear();
  };

  // ---- controls
  const settings = ui.fieldset(side, "Loss");
  const choose = ui.select(settings, { label: "Method", value: state.method,
    options: Object.fromEntries(methods.map(m => [m, style(m).label])),
    onInput: method => {
      Object.values(state.trails).forEach(trail => { trail.shown = trail.points.length; });
      state.method = method;
      refill();
      clear([]);
    } });
  // The method's own sliders, made anew for each method: one that does not count is not there.
  const own = el("div");
  settings.append(own);
  const refill = () => {
    const { method } = state;
    own.replaceChildren();
    choose.set(method);
    ui.slider(own, { ...strengths[method], log: true, value: state.strengths[method],
      onInput: v => { state.strengths[method] = v; clear([method]); } });
    if (method === "vcb_lse") ui.slider(own, { label: "Hard pairs λ", min: 0.01, max: 10,
      log: true, value: state.lam, onInput: v => { state.lam = v; clear([method]); } });
  };
  const [best, , worst] = config.rewards, margin = (best - worst) / 50;
  const middle = ui.slider(settings, { label: "Reward r₂", min: worst + margin,
    max: best - margin, step: margin / 2, value: config.rewards[1],
    onInput: v => { state.rewards[1] = v; clear(); } });
  const buttons = ui.row(side, "buttons");
  ui.button(buttons, { label: "Descend", onClick: run });
  ui.button(buttons, { label: "Reset", onClick: () => {
    cancelAnimationFrame(playing);
    state = begin();
    middle.set(state.rewards[1]);
    refill();
    clear();
  } });
  const say = ui.announcer(side);

  // ---- legend
  const legend = el("div");
  legend.style.cssText = "display:grid;gap:5px;font-size:13px;margin-top:8px";
  const line = attrs => svg("line", { x1: 1, x2: 29, y1: 8, y2: 8, ...attrs });
  const mark = shape => set(shape, { transform: "translate(15 8)" });
  const item = (shape, text) => {
    const node = el("div", {}, svg("svg", { width: 30, height: 17, "aria-hidden": "true" }, shape),
                    el("span", { text }));
    node.style.cssText = "display:flex;align-items:center;gap:8px";
    legend.append(node);
  };
  const low = el("span"), high = el("span"), swatch = el("span");
  swatch.style.cssText = "flex:0 1 90px;height:12px;opacity:.65";
  const scaleRow = el("div", {}, el("span", { text: "loss" }), low, swatch, high);
  scaleRow.style.cssText = "display:flex;align-items:center;gap:8px";
  item(mark(svg("circle", { ...RING, r: 6 })), "start; at 0, 0 the policy is the SFT model");
  item(mark(svg("path", { ...STAR, d: ui.marker("*", 6) })), "lowest point, where there is one");
  item(line(RAY), "gaps in proportion to the rewards’ gaps");
  item(line(EQUAL), "equal gaps");
  legend.append(scaleRow);
  side.append(legend);

  // ---- the start point under the hand
  set(ring, { role: "slider", tabindex: 0, "aria-label": "Start: gaps of the log-ratios; "
    + "left and right arrows move the first, up and down the second", "aria-valuemin": DOMAIN[0],
    "aria-valuemax": DOMAIN[1] });
  ring.addEventListener("keydown", event => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1],
                   PageUp: [0, 10], PageDown: [0, -10] }[event.key];
    if (event.key === "Enter") run();
    if (event.key === "Home") moveTo(0, 0);
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    const step = event.shiftKey ? 1 : .1;
    moveTo(state.start[0] + step * move[0], state.start[1] + step * move[1]);
  });
  const follow = ({ x, y }) => moveTo(across.invert(x), up.invert(y));
  ui.drag(ring, follow);
  // A click, not a drag: a finger on the map must still scroll the page.
  field.addEventListener("click", event => follow(ui.point(field, event)));
  refill();
  draw();
});
