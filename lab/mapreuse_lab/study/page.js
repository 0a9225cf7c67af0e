"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byName = new Map(data.techniques.map((one) => [one.name, one]));
  const full = byName.get(data.full) || {latency: {}, scores: {}};
  const narrow = () => window.innerWidth < 640;
  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colours = (name) => colour(name).split(/\s+/);
  const wrapped = (text) => (text.match(/.{1,48}(?:\s|$)|\S+/g) || [])
    .map((line) => escaped(line.trim())).join("<br>");
  const control = (figure, name) => figure.querySelector(`[name=${name}]`).value;
  const time = (s) => (s >= 1 ? `${s.toFixed(2)} s` : `${(1000 * s).toPrecision(3)} ms`);
  const rate = (share) => `${(100 * share).toFixed(1)}%`;
  const median = (one, length) => one.latency?.[length]?.median ?? null;
  const ratio = (one, length) => (median(one, length) && median(full, length))
    ? median(one, length) / median(full, length) : null;

  const hover = () => ({bgcolor: colour("card"), bordercolor: colour("line"), align: "left",
    font: {color: colour("text"), size: 12, family: "system-ui, sans-serif"}});
  const axis = (more) => ({gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"),
    tickfont: {size: 12}, automargin: true, ...more});
  const layout = (more) => ({paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: colour("text"), family: "system-ui, sans-serif", size: 12}, hoverlabel: hover(),
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("text")},
    margin: {l: 10, r: 14, t: 24, b: 40}, dragmode: narrow() ? false : "zoom", ...more});
  const nothing = (area) => {
    Plotly.purge(area);
    const said = Object.assign(document.createElement("p"), {className: "absent", textContent: "not measured"});
    area.replaceChildren(said);
  };
  const draw = (area, traces, more) => {
    if (!area.matches(".js-plotly-plot")) area.replaceChildren();
    return Plotly.react(area, traces, layout({width: area.clientWidth, ...more}), config());
  };
  const config = () => ({displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    displayModeBar: narrow() ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]});
  const scale = () => [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]];
  const bars = (rows, corpus, metric, more) => {
    const end = (row, side) => {
      const [low, high] = row.scores[corpus][`${metric}_interval`] || [];
      const rate = row.scores[corpus][metric];
      return low == null ? 0 : 100 * (side ? high - rate : rate - low);
    };
    return {type: "data", symmetric: false, array: rows.map((row) => end(row, 1)),
      arrayminus: rows.map((row) => end(row, 0)), thickness: 1, width: 2, ...more};
  };

  const plots = {
    pareto(figure, area) {
      const [length, corpus, metric] = ["length", "corpus", "metric"].map((name) => control(figure, name));
      const rows = data.techniques.filter((one) => ratio(one, length) && one.scores?.[corpus]?.[metric] != null);
      if (!rows.length) return nothing(area);
      const point = (one) => ({x: ratio(one, length), y: 100 * one.scores[corpus][metric]});
      const about = (one) => {
        const [low, high] = one.scores[corpus][`${metric}_interval`] || [];
        const interval = low == null ? "" : ` [${rate(low)}, ${rate(high)}]`;
        const found = one.scores[corpus].against_full?.[metric]?.found;
        return `<b>${escaped(one.title)}</b>` +
          `<br>${metric.toUpperCase()} ${rate(one.scores[corpus][metric])}${interval}` +
          (found ? `<br>against full: ${escaped(found)}` : "") +
          `<br>latency ${ratio(one, length).toFixed(2)} of full's (${time(median(one, length))})` +
          (one.parameters ? `<br>parameters ${(one.parameters / 1e6).toFixed(2)} M` : "") +
          `<br>positions ${escaped(one.positions ?? "not measured")}` +
          `<br>${wrapped(`formula from ${one.source ?? "not measured"}`)}`;
      };
      const symbols = {full: "diamond", reuse: "circle", composed: "square", other: "circle-open"};
      const traces = Object.entries(data.kinds).map(([kind, label]) => {
        const those = rows.filter((one) => (one.kind in data.kinds ? one.kind : "other") === kind);
        return {type: "scatter", mode: "markers", name: label, x: those.map((one) => point(one).x),
          y: those.map((one) => point(one).y), text: those.map(about), hovertemplate: "%{text}<extra></extra>",
          error_y: bars(those, corpus, metric, {color: faded(colour(kind), 0.35)}),
          marker: {color: colour(kind), symbol: symbols[kind], size: kind === "full" ? 12 : 9, line: {width: 1.5}}};
      }).filter((trace) => trace.x.length);
      const names = (data.fronts[metric][corpus]?.[length] || []).filter((name) => rows.includes(byName.get(name)));
      const steps = names.map((name) => byName.get(name)).sort((a, b) => point(a).x - point(b).x);
      if (steps.length) traces.unshift({type: "scatter", mode: "lines", name: "front", hoverinfo: "skip",
        x: steps.map((one) => point(one).x), y: steps.map((one) => point(one).y),
        line: {color: faded(colour("text"), 0.5), width: 1.5, shape: "hv"}});
      const shapes = [{type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", layer: "below",
        line: {color: faded(colour("full"), 0.45), width: 1, dash: "dot"}}];
      const library = data.reference && ratio(data.reference, length);
      if (library) shapes.push({type: "line", x0: library, x1: library, y0: 0, y1: 1, yref: "paper", layer: "below",
        line: {color: colour("reference"), width: 1.5, dash: "dash"}});
      const ys = rows.flatMap((one) => one.scores[corpus][`${metric}_interval`] || [one.scores[corpus][metric]]);
      const near = control(figure, "range") === "near" && full.scores[corpus]?.[metric];
      const low = 100 * Math.min(...ys), high = near ? 150 * full.scores[corpus][metric] : 100 * Math.max(...ys);
      const xs = [1, ...rows.map((one) => point(one).x), ...(library ? [library] : [])].map(Math.log10);
      const span = Math.max(...xs) - Math.min(...xs) || 1;
      const ticks = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 4, 5, 7, 10, 20];
      const fits = narrow() ? ticks.filter((tick) => ![0.9, 0.6, 1.2].includes(tick)) : ticks;
      draw(area, traces, {height: narrow() ? 540 : 620, hovermode: "closest", shapes,
        margin: {l: 10, r: 14, t: 24, b: narrow() ? 160 : 90},
        legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0},
        xaxis: axis({type: "log", title: {text: `latency ÷ full's, T = ${length}`}, tickvals: fits,
          ticktext: fits.map(String), range: [Math.min(...xs) - 0.08 * span, Math.max(...xs) + 0.08 * span]}),
        yaxis: axis({title: {text: `${metric.toUpperCase()}, %`}, rangemode: "tozero",
          range: [Math.max(0, low - 0.06 * (high - low)), high + 0.05 * (high - low)]})});
      const labels = rows.map((one) => ({...point(one), text: shortest(one),
        tone: colour(one.kind) || colour("other"), first: one.kind === "full" || names.includes(one.name)}));
      labels.sort((a, b) => b.first - a.first);
      const top = library ? [{x: Math.log10(library), y: 0.99, yref: "paper", yanchor: "top", showarrow: false,
        text: `transformers (sdpa) ${library.toFixed(2)}`, font: {color: colour("reference"), size: 11},
        textangle: -90, xanchor: "right"}] : [];
      const relabel = () => Plotly.relayout(area, {annotations: [...top, ...placed(area, labels, library)]});
      relabel();
      area.removeAllListeners?.("plotly_relayout");
      area.on("plotly_relayout", (changed) => {
        if (Object.keys(changed).some((key) => /^[xy]axis/.test(key))) relabel();
      });
    },

    grouping(figure, area) {
      const [corpus, metric] = ["corpus", "metric"].map((name) => control(figure, name));
      const rows = data.techniques.filter((one) => ["full", "reuse"].includes(one.kind)
        && one.scores?.[corpus]?.[metric] != null);
      if (!rows.length) return nothing(area);
      const label = (one) => escaped(shortest(one)) +
        (one.grouping ? `<br>${one.grouping[0]} of ${one.grouping[1]} maps` : "");
      rows.sort((a, b) => (b.grouping?.[0] ?? 1e9) - (a.grouping?.[0] ?? 1e9));
      const base = full.scores?.[corpus]?.[metric];
      draw(area, [{type: "scatter", mode: "markers", x: rows.map((one) => 100 * one.scores[corpus][metric]),
        y: rows.map(label), text: rows.map((one) => escaped(one.title)),
        hovertemplate: `%{text}<br>${metric.toUpperCase()} %{x:.1f}%<extra></extra>`,
        error_x: bars(rows, corpus, metric, {color: colour("soft"), width: 4}),
        marker: {size: 11, color: rows.map((one) => colour(one.kind))}}],
      {height: 90 + 48 * rows.length, margin: {l: 10, r: 20, t: 10, b: 40},
        shapes: base ? [{type: "line", x0: 100 * base, x1: 100 * base, y0: 0, y1: 1, yref: "paper", layer: "below",
          line: {color: faded(colour("full"), 0.5), width: 1, dash: "dot"}}] : [],
        xaxis: axis({title: {text: `${metric.toUpperCase()}, %`}}), yaxis: axis({autorange: "reversed"})});
    },

    speed(figure, area) {
      const picked = chosen(figure);
      const traces = picked.map(({name, tone, dash}) => {
        const one = name === "transformers" ? data.reference : byName.get(name);
        const at = data.lengths.filter((length) => ratio(one, length));
        return {type: "scatter", mode: "lines+markers", name: escaped(name), x: at.map(Number),
          y: at.map((length) => 1 / ratio(one, length)), customdata: at.map((length) => time(median(one, length))),
          hovertemplate: "%{fullData.name}: %{y:.2f}×, %{customdata}<extra></extra>",
          line: {color: tone, dash, width: 2}};
      });
      draw(area, traces, {height: narrow() ? 340 : 420, hovermode: "x unified", showlegend: false,
        xaxis: axis({type: "log", title: {text: "length T, encoder frames"}, tickvals: data.lengths.map(Number),
          ticktext: data.lengths, hoverformat: "d", unifiedhovertitle: {text: "T = %{x}"}}),
        yaxis: axis({title: {text: "times as fast as full"}, rangemode: "tozero"})});
    },

    breakdown(figure, area) {
      const entries = Object.entries(data.breakdown[figure.dataset.part]);
      const show = control(figure, "scale");
      const sum = (by) => Object.values(by).reduce((a, b) => a + (b || 0), 0);
      const families = {map: colours("map-parts"), values: colours("value-parts"), other: colours("other-parts")};
      const used = {map: 0, values: 0, other: 0};
      const tones = new Map(data.parts.map(({name, family}) =>
        [name, families[family][used[family]++ % families[family].length]]));
      const order = ["other", "values", "map"].flatMap((family) => data.parts.filter((one) => one.family === family))
        .filter(({name}) => entries.some(([, by]) => Object.values(by).some((at) => at[name])));
      figure.querySelector(".legend")?.remove();
      const legend = document.createElement("div");
      legend.className = "legend";
      for (const {name, label} of [...order].reverse()) {
        const item = legend.appendChild(document.createElement("span"));
        item.appendChild(document.createElement("i")).style.background = tones.get(name);
        item.append(label);
      }
      area.before(legend);
      area.className = "area panels";
      while (area.children.length < entries.length) area.append(document.createElement("div"));
      const [, base] = entries[0];
      const divisor = (by, at) => ({ms: 0.001, share: sum(by[at])}[show] ?? (base[at] ? sum(base[at]) : NaN));
      const all = entries.flatMap(([, by]) => Object.keys(by).map((at) => sum(by[at]) / divisor(by, at)));
      const top = show === "share" ? 1 : 1.04 * Math.max(...all.filter(Number.isFinite));
      entries.forEach(([name, by], index) => {
        const at = Object.keys(by).sort((a, b) => a - b);
        draw(area.children[index], order.map((part) => ({type: "scatter", mode: "lines", stackgroup: "one",
          name: part.label, x: at.map(Number),
          y: at.map((length) => (by[length][part.name] || 0) / divisor(by, length)),
          customdata: at.map((length) => [time(by[length][part.name] || 0),
            (100 * (by[length][part.name] || 0) / sum(by[length])).toFixed(0)]),
          hovertemplate: "%{fullData.name}: %{customdata[0]}, %{customdata[1]}%<extra></extra>",
          line: {width: 0.6, color: colour("page")}, fillcolor: tones.get(part.name)})),
        {height: 300, showlegend: false, hovermode: "closest", margin: {l: 10, r: 10, t: 34, b: 40},
          title: {text: escaped(name), x: 0.02, font: {size: 13}},
          xaxis: axis({title: {text: "T"}, showgrid: false}),
          yaxis: axis({range: [0, top], tickformat: show === "share" ? ".0%" : "",
            title: {text: {ms: "ms", share: "share"}[show] ?? `÷ ${escaped(entries[0][0])}`}})});
      });
    },

    similarity(figure, area) {
      const part = figure.dataset.part;
      const z = data.similarity[part];
      const words = {layers: ["layer", "layer"]}[part] || ["layer", "head"];
      heat(area, z, {range: [0, 1], words, square: part === "layers"});
    },

    phonemes(figure, area) {
      const {phonemes, matrices} = data.phonemes;
      const layers = matrices[control(figure, "technique")];
      const layer = slid(figure, "layer", layers.length);
      heat(area, layers[layer], {names: phonemes, words: ["frames of", "attend to"], square: true,
        height: 620, width: narrow() ? 620 : Math.min(780, area.clientWidth)});
    },

    curves(figure, area) {
      const [corpus, metric] = ["corpus", "metric"].map((name) => control(figure, name));
      const factor = metric === "loss" ? 1 : 100;
      const traces = chosen(figure).flatMap(({name, tone, dash}) => data.curves
        .filter((run) => run.technique === name && run.corpus === corpus)
        .map((run) => {
          const at = run.learning_curve.filter((point) => point[metric] != null);
          return {type: "scatter", mode: "lines", name: `${escaped(name)}, seed ${run.seed}`,
            x: at.map((point) => point.step), y: at.map((point) => factor * point[metric]),
            hovertemplate: `%{fullData.name}, step %{x}: %{y:.3~g}${factor === 1 ? "" : "%"}<extra></extra>`,
            line: {color: tone, dash, width: 1.8}};
        }));
      draw(area, traces, {height: narrow() ? 340 : 420, showlegend: false, hovermode: "closest",
        xaxis: axis({title: {text: "optimizer steps"}}),
        yaxis: axis({title: {text: {dev_wer: "WER, %", dev_cer: "CER, %", loss: "loss"}[metric]},
          rangemode: "tozero"})});
    },
  };

  function heat(area, z, {range, words, names, square, height, width}) {
    const ticks = names ? {tickvals: names.map((_, index) => index), ticktext: names.map(escaped),
      tickfont: {size: 10}, tickangle: 0} : {dtick: z.length > 20 ? 4 : 1};
    const across = names ? ticks : {dtick: (z[0] || []).length > 20 ? 4 : 1};
    const rows = names || z.map((_, index) => index);
    const columns = names || (z[0] || []).map((_, index) => index);
    draw(area, [{type: "heatmap", z, colorscale: scale(), zmin: range?.[0], zmax: range?.[1], xgap: 1, ygap: 1,
      colorbar: {thickness: 10, outlinewidth: 0, len: 0.9},
      text: z.map((row, y) => row.map((_, x) =>
        `${words[0]} ${escaped(rows[y])}, ${words[1]} ${escaped(columns[x])}`)),
      hovertemplate: "%{text}: %{z:.3f}<extra></extra>"}],
    {height: height || 320, width, margin: {l: 10, r: 10, t: 10, b: 40},
      xaxis: axis({title: {text: words[1]}, showgrid: false, zeroline: false, ...across,
        ...(square ? {constrain: "domain"} : {})}),
      yaxis: axis({title: {text: words[0]}, showgrid: false, zeroline: false, autorange: "reversed", ...ticks,
        ...(square ? {scaleanchor: "x", constrain: "domain"} : {})})});
  }

  function shortest({name, title}) {
    return title.length > (narrow() ? name.length : 28) ? name : title;
  }

  function channels(hex) {
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }

  function faded(hex, alpha) {
    return `rgba(${[...channels(hex), alpha].join(",")})`;
  }

  // Labels beside their points, the important ones first; one that finds no free place is left to the hover text,
  // unless it is important: that one gets a line to its point.
  function placed(area, labels, library) {
    const {xaxis, yaxis, _size: size} = area._fullLayout;
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "11px system-ui, sans-serif";
    const at = labels.map(({x, y}) => [xaxis.l2p(Math.log10(x)), yaxis.l2p(y)]);
    const inside = ([x, y]) => x >= 0 && x <= size.w && y >= 0 && y <= size.h;
    const taken = at.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
    if (library) taken.push([xaxis.l2p(Math.log10(library)) - 16, 0, xaxis.l2p(Math.log10(library)) + 2, 150]);
    const free = (box) => box[0] >= 0 && box[1] >= 0 && box[2] <= size.w && box[3] <= size.h
      && taken.every((other) => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
    const around = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
    const found = [];
    labels.forEach(({x, y, text, tone, first}, index) => {
      if (!inside(at[index]) || (narrow() && !first)) return;
      const width = pen.measureText(text).width + 6, height = 14;
      for (const distance of first ? [9, 24, 42, 64, 90] : [9]) {
        for (const [right, down] of around) {
          const centre = [at[index][0] + right * (distance + width / 2) * (right && down ? 0.85 : 1),
            at[index][1] + down * (distance + height / 2)];
          const box = [centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2];
          if (!free(box)) continue;
          taken.push(box);
          found.push({x: Math.log10(x), y, text: escaped(text),
            font: {size: 11, color: first ? tone : colour("soft")},
            showarrow: true, arrowhead: 0, arrowwidth: distance > 9 ? 0.8 : 0.01, standoff: 5, borderpad: 0,
            arrowcolor: distance > 9 ? colour("soft") : "rgba(0,0,0,0)", ax: centre[0] - at[index][0],
            ay: centre[1] - at[index][1], xanchor: "center", yanchor: "middle"});
          return;
        }
      }
    });
    return found;
  }

  function chosen(figure) {
    const tones = colours("series"), dashes = ["solid", "dash", "dot", "dashdot"];
    return [...figure.querySelectorAll(".chip input")].map((box, index) => {
      const tone = box.value === data.full ? colour("full") : box.value === "transformers" ? colour("reference")
        : tones[(index + tones.length - 1) % tones.length];
      box.nextElementSibling.style.background = box.checked ? tone : "";
      return {name: box.value, tone, dash: dashes[Math.floor(index / tones.length) % 4], checked: box.checked};
    }).filter((one) => one.checked);
  }

  function slid(figure, name, count) {
    const slider = figure.querySelector(`[name=${name}]`);
    slider.nextElementSibling.value = slider.value;
    return Math.min(Number(slider.value), count - 1);
  }

  function maps(figure) {
    const {techniques, seconds_per_frame: step} = data.maps;
    const layer = slid(figure, "layer", Infinity), head = slid(figure, "head", Infinity);
    for (const panel of figure.querySelectorAll(".map")) {
      const name = control(panel, "technique"), one = techniques[name];
      const canvas = panel.querySelector("canvas"), readout = panel.querySelector(".readout");
      const heads = one.layers[layer] || [], source = one.source_layers?.[layer];
      const said = !heads.length ? `layer ${layer} has no attention map`
        : !heads[head] ? `layer ${layer} has ${heads.length} heads, none is number ${head}`
          : source != null && source !== layer ? `reusing layer: the map of layer ${source}` : "computing layer";
      panel.querySelector(".said-map").textContent = said;
      canvas.setAttribute("aria-label", `${name}, layer ${layer}, head ${head}: ${said}`);
      const hypothesis = panel.querySelector(".hypothesis");
      hypothesis.replaceChildren(Object.assign(document.createElement("b"), {textContent: "hypothesis"}),
        one.hypothesis ?? "not measured");
      const frames = one.frames;
      canvas.width = canvas.height = frames;
      readout.textContent = "";
      if (!heads[head]) { canvas.onpointermove = canvas.onpointerdown = null; continue; }
      const bytes = Uint8Array.from(atob(heads[head]), (letter) => letter.charCodeAt(0));
      const most = bytes.reduce((a, b) => Math.max(a, b), 1);
      const stops = ["low", "middle", "high"].map((key) => channels(colour(key)));
      const root = control(figure, "scale") === "root";
      const table = Array.from({length: 256}, (_, value) => {
        const share = 2 * Math.min(value / most, 1) ** (root ? 0.5 : 1), at = Math.min(Math.floor(share), 1);
        return stops[at].map((part, index) => part + (stops[at + 1][index] - part) * (share - at));
      });
      const pen = canvas.getContext("2d"), image = pen.createImageData(frames, frames);
      bytes.forEach((value, index) => image.data.set([...table[value], 255], 4 * index));
      pen.putImageData(image, 0, 0);
      canvas.onpointermove = canvas.onpointerdown = (event) => {
        const box = canvas.getBoundingClientRect();
        const [key, query] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
          .map((share) => Math.min(Math.max(Math.floor(share * frames), 0), frames - 1));
        const when = (frame) => step ? `${(frame * step).toFixed(2)} s` : `frame ${frame}`;
        const weight = bytes[query * frames + key] / 255;
        readout.textContent = `query ${when(query)} → key ${when(key)}: weight ${weight.toFixed(3)}`;
      };
    }
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[index];
        if ("value" in cell.dataset) return Number(cell.dataset.value);
        return head.classList.contains("number") ? null : cell.textContent;
      };
      const order = (a, b) => {
        const [one, other] = [key(a), key(b)];
        if (one === null || other === null) return (one === null) - (other === null);
        return (down ? -1 : 1) * (typeof one === "number" && typeof other === "number"
          ? one - other : String(one).localeCompare(String(other), "en", {numeric: true}));
      };
      body.append(...[...body.rows].sort(order));
    }));
  }

  function filtered(table) {
    const filter = document.getElementById("filter"), count = document.getElementById("count");
    const corpus = filter.closest(".controls").querySelector("[name=table-corpus]");
    const apply = () => {
      const words = filter.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) {
        row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
      }
      const rows = [...table.tBodies[0].rows], shown = rows.filter((row) => !row.hidden).length;
      count.textContent = `${shown} of ${rows.length} rows`;
      for (const cell of table.querySelectorAll("[data-corpus]")) {
        cell.hidden = corpus.value !== "" && cell.dataset.corpus !== corpus.value;
      }
    };
    filter.addEventListener("input", apply);
    corpus.addEventListener("change", apply);
    apply();
  }

  const figures = [...document.querySelectorAll("figure[data-plot]")];
  const fill = (figure) => {
    const area = figure.querySelector(".area");
    if (figure.dataset.plot === "maps") maps(figure);
    else if (area) plots[figure.dataset.plot](figure, area);
  };
  const render = (figure) => {
    try {
      fill(figure);
    } catch (error) {  // the other plots, and the tables, do not depend on this one
      if (!figure.dataset.failed) figure.append(`Not drawn: ${error.message}`);
      figure.dataset.failed = "yes";
    }
  };
  for (const figure of figures) {
    figure.addEventListener("input", () => render(figure));
    render(figure);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(render));
  let width = innerWidth, waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (innerWidth !== width) { width = innerWidth; figures.forEach(render); }
    }, 150);
  });
  document.querySelectorAll("table.sortable").forEach(sortable);
  const table = document.getElementById("techniques-table");
  if (table) filtered(table);
})();
