// What the explorables share: the losses of vcb_nb/losses.py for one prompt, and the controls.
// A plain script without dependencies: it stands in every figure's HTML and may load many times.
globalThis.VCBX = (old => {
  const VERSION = "source";
  if (old && old.version === VERSION) return old;

  // ---- numbers ------------------------------------------------------------------------------
  const sum = x => x.reduce((a, b) => a + b, 0);
  const mean = x => sum(x) / x.length;
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const centred = x => { const m = mean(x); return x.map(v => v - m); };
  const variance = x => sum(centred(x).map(v => v * v)) / Math.max(x.length - 1, 1);
  const std = x => Math.sqrt(variance(x));
  const logsumexp = x => {
    const top = Math.max(...x);
    return top + Math.log(sum(x.map(v => Math.exp(v - top))));
  };
  const logSoftmax = x => { const z = logsumexp(x); return x.map(v => v - z); };
  const softmax = x => logSoftmax(x).map(Math.exp);
  const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  const sigmoid = x => x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
  const expected = (logps, values) => sum(logps.map((l, i) => Math.exp(l) * values[i]));
  // Each term is non-negative, so that nothing cancels near zero.
  const kl = (logps, other) => sum(logps.map((l, i) =>
    Math.exp(l) * (Math.expm1(other[i] - l) - (other[i] - l))));
  const pairs = n => {
    const found = [];
    for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) found.push([i, j]);
    return found;
  };
  const rewardStd = (refLogps, rewards) => {
    const m = expected(refLogps, rewards);
    return Math.sqrt(expected(refLogps, rewards.map(r => (r - m) ** 2)));
  };

  // ---- losses, one prompt: same defaults, same guards as vcb_nb/losses.py --------------------
  const REWARD_RESOLUTION = 1e-6, FLOAT_STEPS = 4;
  const largest = r => Math.max(...r.map(Math.abs));
  const resolution = r => Math.max(REWARD_RESOLUTION * largest(centred(r)),
                                   FLOAT_STEPS * Number.EPSILON * largest(r));
  const ratios = (logps, ref) => logps.map((l, i) => l - ref[i]);
  const hasSignal = r => std(r) > resolution(r);
  // [winner, loser] of each pair that is not a tie.
  const ordered = rewards => {
    const floor = resolution(rewards);
    return pairs(rewards.length)
      .filter(([i, j]) => Math.abs(rewards[i] - rewards[j]) > floor)
      .map(([i, j]) => rewards[i] > rewards[j] ? [i, j] : [j, i]);
  };
  const best = rewards => {
    const top = Math.max(...rewards), floor = resolution(rewards);
    return rewards.map((_, i) => i).filter(i => rewards[i] >= top - floor);
  };

  // e_i = gamma l_i - (r_i - mean)/sigma; null where the prompt carries no signal.
  const residuals = (logratios, rewards, { gamma = 1, sigma = std(rewards) } = {}) => {
    if (!hasSignal(rewards) || !(sigma > resolution(rewards))) return null;
    return centred(rewards).map((r, i) => gamma * logratios[i] - r / sigma);
  };
  const pairLosses = e => pairs(e.length).map(([i, j]) => (e[i] - e[j]) ** 2);
  const pairWeights = (losses, lam) => softmax(losses.map(l => lam * l));
  // (1/lam) log mean exp(lam x); relative to the maximum, so that nothing overflows.
  const logMeanExp = (x, lam) => {
    const top = Math.max(...x);
    return top + Math.log1p(mean(x.map(v => Math.expm1(lam * (v - top))))) / lam;
  };
  const vcb = (logps, ref, rewards, params = {}) => {
    const e = residuals(ratios(logps, ref), rewards, params);
    if (!e) return 0;
    return params.lam ? logMeanExp(pairLosses(e), params.lam) : 2 * variance(e);
  };

  // ---- their gradients with respect to logps: slopes[name](ref, rewards, params)(logps) ------
  // What does not depend on logps is computed once: descent calls the rest many times.
  const vcbSlope = (ref, rewards, params = {}) => {
    const z = residuals(rewards.map(() => 0), rewards, params), n = rewards.length;
    const gamma = params.gamma ?? 1, all = pairs(n);
    if (!z) return () => rewards.map(() => 0);
    const residual = logps => z.map((v, i) => v + gamma * (logps[i] - ref[i]));
    if (!params.lam) return logps => centred(residual(logps)).map(v => 4 * gamma * v / (n - 1));
    return logps => {
      const e = residual(logps), g = e.map(() => 0), w = pairWeights(pairLosses(e), params.lam);
      all.forEach(([i, j], k) => {
        const d = 2 * gamma * w[k] * (e[i] - e[j]);
        g[i] += d; g[j] -= d;
      });
      return g;
    };
  };
  // A loss over ordered pairs: cost and slope of a gap between winner and loser, the weight of
  // all pairs and of the best candidate's likelihood (anchor), where the gap is measured.
  const orderBased = terms => {
    const parts = (ref, rewards, params) => {
      const { mean: average, weight = 1, anchor = 0, from, lengths, ...rest } =
        terms(ref, rewards, params);
      const found = ordered(rewards), top = anchor ? best(rewards) : [];
      const score = logps => logps.map((l, i) =>
        (from ? l - from[i] : l) / (lengths ? lengths[i] : 1));
      return { found, top, anchor, score, lengths,
               scale: average ? weight / found.length : weight, ...rest };
    };
    const value = (logps, ref, rewards, params = {}) => {
      if (!hasSignal(rewards)) return 0;
      const { found, top, anchor, score, scale, cost } = parts(ref, rewards, params);
      const s = score(logps), total = scale * sum(found.map(([w, l]) => cost(s[w] - s[l])));
      return anchor ? total - anchor * mean(top.map(i => logps[i])) : total;
    };
    const slope = (ref, rewards, params = {}) => {
      if (!hasSignal(rewards)) return () => rewards.map(() => 0);
      const { found, top, anchor, score, scale, steep, lengths } = parts(ref, rewards, params);
      return logps => {
        const s = score(logps), g = s.map(() => 0);
        for (const [w, l] of found) {
          const d = scale * steep(s[w] - s[l]);
          g[w] += d; g[l] -= d;
        }
        if (lengths) g.forEach((v, i) => { g[i] = v / lengths[i]; });
        for (const i of top) g[i] -= anchor / top.length;
        return g;
      };
    };
    return { value, slope };
  };
  const dpo = orderBased((ref, _, { beta = .1 }) => ({
    mean: true, from: ref,
    cost: gap => softplus(-beta * gap), steep: gap => -beta * sigmoid(-beta * gap),
  }));
  const ipo = orderBased((ref, _, { tau = .1 }) => ({
    mean: true, from: ref,
    cost: gap => (gap - .5 / tau) ** 2, steep: gap => 2 * (gap - .5 / tau),
  }));
  const slic = orderBased((_, __, { delta = 1, lam_reg = .1 }) => ({
    mean: true, anchor: lam_reg,
    cost: gap => Math.max(0, delta - gap), steep: gap => gap < delta ? -1 : 0,
  }));
  const rrhf = orderBased((_, rewards, { rank_weight = 1, lengths = rewards.map(() => 1) }) => ({
    weight: rank_weight, anchor: 1, lengths,
    cost: gap => Math.max(0, -gap), steep: gap => gap < 0 ? -1 : 0,
  }));
  // A relative that sees values: terms(r, params) gives cost and slope of the log-ratios; r is
  // centred, and over sigma where that is given.
  const valueBased = terms => {
    const usable = (rewards, sigma = 1) =>
      hasSignal(rewards) && (sigma === 1 || sigma > resolution(rewards));
    const scaled = (rewards, sigma = 1) => centred(rewards).map(r => r / sigma);
    return {
      value: (logps, ref, rewards, params = {}) => usable(rewards, params.sigma)
        ? terms(scaled(rewards, params.sigma), params).cost(ratios(logps, ref)) : 0,
      slope: (ref, rewards, params = {}) => {
        if (!usable(rewards, params.sigma)) return () => rewards.map(() => 0);
        const { steep } = terms(scaled(rewards, params.sigma), params);
        return logps => steep(ratios(logps, ref));
      },
    };
  };
  const rpoSq = valueBased((r, { beta = 1, eta = 1 }) => {
    const e = l => l.map((v, i) => beta * v - eta * r[i]), scale = 4 * beta / (r.length - 1);
    return { cost: l => 2 * variance(e(l)), steep: l => centred(e(l)).map(v => scale * v) };
  });
  const rpoBwd = valueBased((r, { beta = 1, eta = 1 }) => {
    const all = pairs(r.length), asked = all.map(([i, j]) => eta * (r[i] - r[j]));
    const got = l => all.map(([i, j]) => beta * (l[i] - l[j]));
    return {
      cost: l => mean(got(l).map((g, k) => sigmoid(asked[k]) * (asked[k] - g)
                                           - softplus(asked[k]) + softplus(g))),
      steep: l => {
        const g = l.map(() => 0);
        got(l).forEach((v, k) => {
          const d = beta * (sigmoid(v) - sigmoid(asked[k])) / all.length;
          g[all[k][0]] += d; g[all[k][1]] -= d;
        });
        return g;
      },
    };
  });
  const infonca = valueBased((r, { beta = .1, alpha = 1 }) => {
    const target = softmax(r.map(v => v / alpha)), scaled = l => l.map(v => beta * v);
    return { cost: l => -sum(logSoftmax(scaled(l)).map((v, i) => target[i] * v)),
             steep: l => softmax(scaled(l)).map((p, i) => beta * (p - target[i])) };
  });
  const dro = valueBased((r, { tau = 1 }) => {
    const e = l => centred(r.map((v, i) => v - tau * l[i]));
    return { cost: l => mean(e(l).map(v => v * v)),
             steep: l => e(l).map(v => -2 * tau * v / r.length) };
  });
  const lse = params => ({ lam: 1, ...params });
  const relatives = { dpo, ipo, slic, rrhf, rpo_sq: rpoSq, rpo_bwd: rpoBwd, infonca, dro };
  const each = key => Object.fromEntries(Object.entries(relatives).map(([k, v]) => [k, v[key]]));
  const losses = { vcb, ...each("value"),
                   vcb_lse: (logps, ref, rewards, p) => vcb(logps, ref, rewards, lse(p)) };
  const slopes = { vcb: vcbSlope, ...each("slope"),
                   vcb_lse: (ref, rewards, p) => vcbSlope(ref, rewards, lse(p)) };
  const gradients = Object.fromEntries(Object.entries(slopes).map(([name, slope]) =>
    [name, (logps, ref, rewards, params) => slope(ref, rewards, params)(logps)]));
  // `steps` steps of gradient descent on one free logit per response; the path, start included.
  const descend = (name, refLogps, rewards, params, { steps, lr, start = refLogps }) => {
    const slope = slopes[name](refLogps, rewards, params), path = [logSoftmax(start)];
    for (let s = 0; s < steps; s++) {
      const logps = path[s], g = slope(logps), total = sum(g);
      path.push(logSoftmax(logps.map((z, i) => z - lr * (g[i] - Math.exp(z) * total))));
    }
    return path;
  };
  // Adam on one free logit per response, as torch's: (gradient by logps, learning rate) => logps.
  // Its epsilon is large, so that a gradient of zero up to rounding stays without effect.
  const EPSILON = .01;
  const adam = start => {
    const z = start.slice(), m = z.map(() => 0), v = z.map(() => 0);
    let t = 0;
    return (g, lr) => {
      const logps = logSoftmax(z), total = sum(g);
      t += 1;
      z.forEach((_, i) => {
        const d = g[i] - Math.exp(logps[i]) * total;
        m[i] += .1 * (d - m[i]);
        v[i] += .001 * (d * d - v[i]);
        z[i] -= lr / (1 - .9 ** t) * m[i] / (Math.sqrt(v[i] / (1 - .999 ** t)) + EPSILON);
      });
      return logSoftmax(z);
    };
  };
  // `steps` steps of Adam on all responses; the path, start included.
  const train = (name, refLogps, rewards, params, { steps, lr }) => {
    const slope = slopes[name](refLogps, rewards, params), path = [refLogps];
    for (let s = 0, step = adam(refLogps); s < steps; s++) path.push(step(slope(path[s]), lr));
    return path;
  };

  // ---- closed forms --------------------------------------------------------------------------
  const optimum = (refLogps, rewards, gamma, sigma = rewardStd(refLogps, rewards)) =>
    logSoftmax(refLogps.map((l, i) => l + rewards[i] / (gamma * sigma)));
  const logPartition = (refLogps, rewards, gamma, sigma = rewardStd(refLogps, rewards)) =>
    logsumexp(refLogps.map((l, i) => l + rewards[i] / (gamma * sigma)));
  // [{kl, reward}] of the tilted policies at these gammas: the exact reward-KL frontier.
  const frontier = (refLogps, rewards, gammas, sigma = rewardStd(refLogps, rewards)) =>
    gammas.map(gamma => {
      const logps = optimum(refLogps, rewards, gamma, sigma);
      return { gamma, kl: kl(logps, refLogps), reward: expected(logps, rewards) };
    });

  const math = {
    sum, mean, clamp, centred, variance, std, logsumexp, logSoftmax, softmax, softplus, sigmoid,
    expected, kl, pairs, rewardStd, ratios, ordered, best, residuals, pairLosses, pairWeights,
    logMeanExp, descend, adam, train, slopes, optimum, logPartition, frontier,
  };

  // ---- elements ------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  // Only what changed is written: an unchanged attribute costs no layout.
  const set = (node, attrs) => {
    for (const [key, value] of Object.entries(attrs)) {
      if (key === "text") { if (node.textContent !== `${value}`) node.textContent = value; }
      else if (node.getAttribute(key) !== `${value}`) node.setAttribute(key, value);
    }
    return node;
  };
  const make = (node, attrs, children) => {
    set(node, attrs || {});
    node.append(...children);
    return node;
  };
  const el = (tag, attrs, ...children) => make(document.createElement(tag), attrs, children);
  const svg = (tag, attrs, ...children) =>
    make(document.createElementNS(SVG, tag), attrs, children);
  // One drawing of its own viewBox; several stand in a flex row and wrap on a narrow page.
  const panel = (parent, { width, height, label, grow = width, max = 1.35 }) => {
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group",
                              "aria-label": label, class: "vcbx-panel" });
    node.style.flex = `${grow} 1 ${width}px`;
    node.style.maxWidth = `${Math.round(width * max)}px`;
    parent.append(node);
    return node;
  };
  const row = (parent, name = "panels") => {
    const node = el("div", { class: `vcbx-${name}` });
    parent.append(node);
    return node;
  };
  // Readable on light and on dark pages: mixed with the text's colour, which black becomes.
  const isBlack = color => /^#([0-2].){3}$/.test(color);
  const tint = color =>
    isBlack(color) ? "currentColor" : `color-mix(in srgb, ${color} 65%, currentColor)`;
  // The same for letters, which need more contrast than lines do.
  const ink = color =>
    isBlack(color) ? "currentColor" : `color-mix(in srgb, ${color} 46%, currentColor)`;
  const polygon = (n, size, turn) => "M" + Array.from({ length: n }, (_, k) => {
    const a = turn + 2 * Math.PI * k / n;
    return `${(size * Math.cos(a)).toFixed(2)} ${(size * Math.sin(a)).toFixed(2)}`;
  }).join("L") + "Z";
  // Path data of the book's markers (matplotlib's letters), centred at 0, 0.
  const marker = (shape, size = 5) => {
    const s = size, up = -Math.PI / 2;
    if (shape === "s") return polygon(4, s * 1.2, Math.PI / 4);
    if (shape === "D") return polygon(4, s * 1.2, 0);
    if (shape === "^") return polygon(3, s * 1.25, up);
    if (shape === "v") return polygon(3, s * 1.25, -up);
    if (shape === "h") return polygon(6, s * 1.1, up);
    if (shape === "x") return `M${-s} ${-s}L${s} ${s}M${-s} ${s}L${s} ${-s}`;
    if (shape === "*") return "M" + Array.from({ length: 10 }, (_, k) => {
      const a = up + Math.PI * k / 5, r = k % 2 ? s * .55 : s * 1.35;
      return `${(r * Math.cos(a)).toFixed(2)} ${(r * Math.sin(a)).toFixed(2)}`;
    }).join("L") + "Z";
    return `M${-s} 0A${s} ${s} 0 1 1 ${s} 0A${s} ${s} 0 1 1 ${-s} 0Z`;
  };

  // ---- scales and axes -----------------------------------------------------------------------
  const scale = (d0, d1, r0, r1) => {
    const map = x => r0 + (x - d0) / (d1 - d0) * (r1 - r0);
    map.invert = y => d0 + (y - r0) / (r1 - r0) * (d1 - d0);
    map.domain = [d0, d1];
    map.range = [r0, r1];
    return map;
  };
  const ticks = (low, high, count = 5) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find(m => m * power >= raw * .999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++)
      found.push(+(k * step).toPrecision(12));
    return found;
  };
  const round = (x, digits = 2) => {
    const text = x.toFixed(digits);
    return (+text === 0 ? (0).toFixed(digits) : text).replace("-", "\u2212");
  };
  const tickText = values => {
    const step = values.length > 1 ? values[1] - values[0] : 1;
    const digits = clamp(Math.ceil(-Math.log10(step) - 1e-9), 0, 4);
    return x => round(x, digits);
  };
  const placeTick = (axis, node, value, text) => {
    const { side, at } = axis, p = axis.scale(value);
    const [line, label] = node.children, bottom = side === "bottom";
    set(node, { visibility: "visible" });
    set(line, bottom ? { x1: p, x2: p, y1: at, y2: axis.grid ?? at + 4 }
                     : { y1: p, y2: p, x1: at, x2: axis.grid ?? at - 4 });
    set(label, bottom ? { x: p, y: at + 17, text } : { x: at - 7, y: p + 4, text });
  };
  // Axis at x or y = `at`, its labels in the pool of nodes of the first draw.
  // {side: 'bottom'|'left', at, scale, label, values?, format?, grid?: far end of the grid lines}
  const axis = (parent, options) => {
    const bottom = options.side === "bottom", pool = [];
    const group = svg("g", { class: `vcbx-axis vcbx-${options.side}` });
    const line = svg("line", { class: "vcbx-line" }), title = svg("text", { class: "vcbx-title" });
    group.append(line, title);
    parent.append(group);
    const update = (changes = {}) => {
      Object.assign(options, changes);
      const [r0, r1] = options.scale.range, { at } = options;
      const values = options.values || ticks(...options.scale.domain, options.count);
      const format = options.format || tickText(values);
      while (pool.length < values.length) {
        pool.push(svg("g", {}, svg("line", { class: options.grid === undefined ? "vcbx-line"
          : "vcbx-grid" }), svg("text", { "text-anchor": bottom ? "middle" : "end" })));
        group.prepend(pool.at(-1));
      }
      pool.forEach((node, k) => k < values.length
        ? placeTick(options, node, values[k], format(values[k]))
        : set(node, { visibility: "hidden" }));
      set(line, bottom ? { x1: r0, x2: r1, y1: at, y2: at } : { y1: r0, y2: r1, x1: at, x2: at });
      set(title, { text: options.label || "", ...(bottom
        ? { x: (r0 + r1) / 2, y: at + 35, "text-anchor": "middle" }
        : { x: at, y: Math.min(r0, r1) - 12, "text-anchor": "start", dx: options.dx ?? -30 }) });
    };
    update();
    return { group, update };
  };

  // ---- controls ------------------------------------------------------------------------------
  const fieldset = (parent, legend, look = "") => {
    const node = el("fieldset", { class: look && `vcbx-${look}` }, el("legend", { text: legend }));
    parent.append(node);
    return node;
  };
  // A labelled native slider; `log` spreads it over powers of ten, `name` is for screen readers.
  const slider = (parent, { label, min, max, step, value, log = false, format, unit = "",
                            name = label, onInput }) => {
    const to = log ? Math.log10 : x => x, from = log ? x => 10 ** x : x => x;
    const say = format || (x => round(x, 2));
    const input = el("input", { type: "range", min: to(min), max: to(max),
                                step: step ?? (to(max) - to(min)) / 200, "aria-label": name });
    const output = el("output");
    const show = x => {
      const text = say(x) + (unit && ` ${unit}`);
      set(output, { text });
      set(input, { "aria-valuetext": text });
    };
    const node = el("label", { class: "vcbx-slider" },
                    el("span", { text: label, class: "vcbx-name" }), input, output);
    const control = { node, input, value, set: x => {
      control.value = x;
      input.value = to(x);
      show(x);
    } };
    input.addEventListener("input", () => {
      control.value = from(+input.value);
      show(control.value);
      onInput(control.value);
    });
    control.set(value);
    parent.append(node);
    return control;
  };
  // options: {value: text}
  const select = (parent, { label, options, value, onInput }) => {
    const choice = ([key, text]) => el("option", { value: key, text });
    const input = el("select", { "aria-label": label }, ...Object.entries(options).map(choice));
    input.value = value;
    input.addEventListener("change", () => onInput(input.value));
    const node = el("label", { class: "vcbx-select" }, el("span", { text: label }), input);
    parent.append(node);
    return { node, input, get value() { return input.value; }, set: x => { input.value = x; } };
  };
  const checkbox = (parent, { label, value, onInput }) => {
    const input = el("input", { type: "checkbox" });
    input.checked = value;
    input.addEventListener("change", () => onInput(input.checked));
    const node = el("label", { class: "vcbx-check" }, input, el("span", { text: label }));
    parent.append(node);
    return { node, input, get value() { return input.checked; },
             set: x => { input.checked = x; } };
  };
  const button = (parent, { label, onClick }) => {
    const node = el("button", { type: "button", text: label });
    node.addEventListener("click", onClick);
    parent.append(node);
    return node;
  };

  // ---- pointer and keyboard ------------------------------------------------------------------
  const point = (node, event) => {
    const box = (node.ownerSVGElement || node).getScreenCTM().inverse();
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(box);
  };
  // onmove({x, y} in the drawing's units) from the press until the release; mouse, pen and touch.
  const drag = (node, onmove) => {
    node.style.touchAction = "none";
    node.classList.add("vcbx-drag");
    node.addEventListener("pointerdown", event => {
      if (event.button) return;
      node.setPointerCapture(event.pointerId);
      if (node.hasAttribute("tabindex")) node.focus({ preventScroll: true });
      event.preventDefault();
      onmove(point(node, event), event);
    });
    node.addEventListener("pointermove", event => {
      if (node.hasPointerCapture(event.pointerId)) onmove(point(node, event), event);
    });
  };
  const KEYS = { ArrowRight: 1, ArrowUp: 1, PageUp: 10,
                 ArrowLeft: -1, ArrowDown: -1, PageDown: -10 };
  // Makes a drawn node a slider for the keyboard too; call the returned show(value) on redraw.
  const handle = (node, { label, min, max, step, get, text = x => round(x, 2), onInput }) => {
    set(node, { role: "slider", tabindex: 0, "aria-label": label, "aria-valuemin": min,
                "aria-valuemax": max });
    node.addEventListener("keydown", event => {
      const ends = { Home: min, End: max };
      if (!(event.key in KEYS) && !(event.key in ends)) return;
      event.preventDefault();
      event.stopPropagation();
      onInput(ends[event.key] ?? clamp(get() + KEYS[event.key] * step, min, max));
    });
    return value => set(node, { "aria-valuenow": +value.toFixed(4),
                                "aria-valuetext": text(value) });
  };

  // ---- drawing in time -----------------------------------------------------------------------
  const stats = { draws: 0, ms: 0, longest: 0 };
  const timed = draw => {
    const start = performance.now();
    draw();
    const ms = performance.now() - start;
    Object.assign(stats, { draws: stats.draws + 1, ms: stats.ms + ms,
                           longest: Math.max(stats.longest, ms) });
  };
  // Many requests, one draw per frame.
  const schedule = draw => {
    let pending = false;
    return () => {
      if (pending) return;
      pending = true;
      requestAnimationFrame(() => { pending = false; timed(draw); });
    };
  };
  // A polite live region: say(sentence) shows it at once, announces it at most twice a second.
  const announcer = parent => {
    const seen = el("p", { class: "vcbx-result", "aria-hidden": "true" });
    const heard = el("p", { class: "vcbx-hidden", "aria-live": "polite" });
    parent.append(seen, heard);
    let timer = 0, latest = "";
    return sentence => {
      latest = sentence;
      set(seen, { text: sentence });
      timer = timer || setTimeout(() => { timer = 0; set(heard, { text: latest }); }, 500);
    };
  };
  // A mutable text in the row of facts: fact(parent, name) gives show(text).
  const fact = (parent, name) => {
    const title = el("small", { text: name }), value = el("b");
    parent.append(el("span", {}, title, value));
    return (text, newName = name) => {
      set(value, { text });
      set(title, { text: newName });
    };
  };
  const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

  // Plays a count from where it is (from 0 at the end) up to `most`: at once if motion is unwanted.
  const player = ({ most, get, put, seconds = 4 }) => {
    let frame = 0;
    const stop = () => { cancelAnimationFrame(frame); frame = 0; };
    const play = () => {
      stop();
      if (still()) return put(most);
      const from = get() < most ? get() : 0, first = performance.now();
      const tick = time => {
        const share = clamp((time - first) / 1000 / seconds, 0, 1);
        put(Math.min(most, Math.ceil(from + share * most)));
        if (get() < most) frame = requestAnimationFrame(tick);
      };
      frame = requestAnimationFrame(tick);
    };
    return { play, stop };
  };

  const ui = {
    set, el, svg, panel, row, tint, ink, marker, scale, ticks, round, axis, fieldset, slider,
    select, checkbox, button, point, drag, handle, schedule, announcer, fact, player, still,
  };

  // ---- figures -------------------------------------------------------------------------------
  const figures = { ...(old && old.figures) };
  const register = (name, draw) => { figures[name] = draw; };
  // JupyterLab takes the arrow keys of whatever has the focus, unless that element itself says no.
  const keepKeys = root => root.addEventListener("focusin", ({ target }) =>
    target.setAttribute("data-lm-suppress-shortcuts", "true"));
  const start = () => {
    for (const root of document.querySelectorAll(".vcbx[data-vcbx]:not([data-vcbx-ready])")) {
      if (!figures[root.dataset.vcbx]) continue;
      root.setAttribute("data-vcbx-ready", "");
      keepKeys(root);
      figures[root.dataset.vcbx](root, JSON.parse(root.dataset.config));
    }
  };
  return { version: VERSION, losses, gradients, math, ui, figures, register, start, stats };
})(globalThis.VCBX);
if (typeof module !== "undefined") module.exports = globalThis.VCBX;
