"use strict";
// Records come as columns; text columns are numbers into a sorted list of words, so that sorting compares numbers.
(() => {
  const STATES = ["tampered", "error", "not_checked", "intact"];
  const WORDS = ["tampered", "could not be checked", "not checked", "intact"];
  const PAGE = 100;
  const $ = (id) => document.getElementById(id);

  async function unpack(id) {
    const text = $(id).textContent.trim();
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function table(columns) {
    const count = columns.state.length;
    const words = (name, row) => columns[name].words[columns[name].codes[row]];
    const numbers = (name) => columns[name].codes || columns[name];
    const shown = new Set([0, 1, 2, 3]);
    let order = Array.from({ length: count }, (_, row) => row);
    let rows = order;
    let first = 0;
    let haystack = null;

    function search() {
      const needles = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      if (needles.length && !haystack) {
        haystack = Array.from({ length: count }, (_, row) =>
          `${words("model_id", row)} ${words("uri", row)} ${words("finding", row)} ${WORDS[columns.state[row]]}`.toLowerCase());
      }
      rows = order.filter((row) => shown.has(columns.state[row]) && needles.every((needle) => haystack[row].includes(needle)));
      first = 0;
      draw();
    }

    function sort(header, name) {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of document.querySelectorAll("#all th")) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const values = numbers(name);
      const sign = down ? -1 : 1;
      // What has no value comes last, whichever way.
      order.sort((a, b) => (values[a] === null) - (values[b] === null) || sign * (values[a] - values[b]) || a - b);
      search();
    }

    function draw() {
      const body = $("rows");
      const drawn = rows.slice(first, first + PAGE).map((row) => {
        const line = element("tr");
        const state = columns.state[row];
        const badge = element("td");
        badge.append(element("span", WORDS[state], `badge state-${STATES[state]}`));
        const name = element("td", undefined, "name");
        name.append(element("span", words("model_id", row)), element("br"), element("small", words("uri", row)));
        const labels = columns.triggers[row] === null ? "" : `${columns.matches[row]}/${columns.triggers[row]}`;
        const looked = new Date(columns.looked[row] * 1000).toISOString().slice(0, 16).replace("T", " ");
        line.append(badge, name, element("td", words("finding", row)), element("td", labels, "n"),
          element("td", looked, "time"), element("td", columns.ms[row].toFixed(1), "n"));
        return line;
      });
      body.replaceChildren(...drawn);
      const last = Math.min(first + PAGE, rows.length);
      $("count").textContent = rows.length
        ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${rows.length.toLocaleString("en")} checkpoints`
        : "no checkpoint is like that";
      $("previous").disabled = first === 0;
      $("next").disabled = last >= rows.length;
    }

    $("search").addEventListener("input", search);
    for (const button of document.querySelectorAll(".filter")) {
      button.addEventListener("click", () => {
        const state = STATES.indexOf(button.dataset.state);
        if (!shown.delete(state)) shown.add(state);
        button.setAttribute("aria-pressed", String(shown.has(state)));
        search();
      });
    }
    for (const header of document.querySelectorAll("#all th")) {
      header.firstElementChild.addEventListener("click", () => sort(header, header.dataset.sort));
    }
    const turn = (step) => () => {
      first = Math.max(0, first + step * PAGE);
      draw();
      $("all").scrollIntoView({ block: "start" });
    };
    $("previous").addEventListener("click", turn(-1));
    $("next").addEventListener("click", turn(1));
    search();
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  function layout(more) {
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), fixedrange: true };
    const made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 50, r: 10, t: 10, b: 40 },
      font: { color: colour("text"), family: "system-ui, sans-serif", size: 13 }, barmode: "stack", bargap: 0.25,
      legend: { orientation: "h", y: 1.08, yanchor: "bottom", traceorder: "normal" }, hovermode: "closest", ...more,
    };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) made[name] = { ...axis, ...made[name] };
    return made;
  }

  const tail = (text, length) => (text.length > length ? `\u2026${text.slice(1 - length)}` : text);

  // Without it, a chart of a few has ticks at halves.
  const whole = (values) => (Math.max(...values) < 5 ? 1 : undefined);

  function charts(data) {
    // The library reads a little markup in labels.
    const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
    const plots = [];
    if (data.runs.length && $("chart-runs")) {
      const step = Math.max(1, Math.ceil(data.runs.length / 8));
      const ticks = data.runs.map((_, run) => run).filter((run) => run % step === 0);
      const hover = data.runs.map((run) => plain(`${run.label}, ${run.run_id}${run.complete ? "" : " (not complete)"}`));
      const bars = (name, words, axis, pattern) => () => ({
        type: "bar", name: words, x: data.runs.map((_, run) => run), y: data.runs.map((run) => run[name]), yaxis: axis,
        customdata: hover, hovertemplate: "%{y:,} %{fullData.name}<br>%{customdata}<extra></extra>",
        marker: { color: colour(name), pattern: { shape: pattern, size: 6, solidity: 0.25, fillmode: "overlay", fgcolor: colour("card") } },
      });
      plots.push(["chart-runs", [bars("tampered", "tampered", "y", ""), bars("error", "could not be checked", "y", "/"), bars("intact", "intact", "y2", "")],
        () => ({ height: 380, xaxis: { tickvals: ticks, ticktext: ticks.map((run) => data.runs[run].label.replace(/ (\d+:\d+)$/, "<br>$1")), showgrid: false, zeroline: false },
          yaxis: { domain: [0, 0.46], rangemode: "tozero", title: { text: "not intact" }, tickformat: ",d", dtick: whole(data.runs.map((run) => run.tampered + run.error)) },
          yaxis2: { domain: [0.56, 1], rangemode: "tozero", title: { text: "intact" }, tickformat: ",d", dtick: whole(data.runs.map((run) => run.intact)) } })]);
    }
    if (data.slowest.length && $("chart-slowest")) {
      const y = data.slowest.map((_, row) => row);
      const bars = (name, words, shade) => () => ({
        type: "bar", orientation: "h", name: words, y, x: data.slowest.map((row) => row[name] / 1000),
        marker: { color: colour(shade) }, hovertemplate: "%{x:.2f} s %{fullData.name}<extra></extra>",
      });
      plots.push(["chart-slowest", [bars("fetch_ms", "fetch", "link"), bars("load_ms", "load", "error"), bars("verify_ms", "verify", "not_checked")],
        () => ({ height: 120 + 24 * y.length, margin: { l: 260, r: 10, t: 10, b: 45 }, xaxis: { title: { text: "seconds of a worker" } },
          yaxis: { autorange: "reversed", tickvals: y, ticktext: data.slowest.map((row) => plain(tail(row.label, 36))), showgrid: false } })]);
    }
    if (data.keys.length && $("chart-keys")) {
      const y = data.keys.map((_, row) => row);
      plots.push(["chart-keys", [() => ({
        type: "bar", orientation: "h", y, x: data.keys.map((key) => 100 * key.coverage), marker: { color: colour("link") },
        text: data.keys.map((key) => `${(100 * key.coverage).toFixed(1)} %`), hoverinfo: "skip", showlegend: false,
      })], () => ({ height: 80 + 26 * y.length, margin: { l: 220, r: 10, t: 10, b: 45 }, xaxis: { range: [0, 100], title: { text: "% of the parameters" } },
        yaxis: { autorange: "reversed", tickvals: y, ticktext: data.keys.map((key) => plain(tail(key.label, 30))), showgrid: false } })]);
    }
    const draw = (width) => {
      for (const [id, traces, more] of plots) {
        const narrow = $(id).clientWidth < 560;
        const made = layout({ ...more(), ...(width ? { width } : {}) });
        if (narrow && made.margin.l > 100) made.margin.l = 130;
        Plotly.react(id, traces.map((trace) => trace()), made, { displayModeBar: false, responsive: !width });
      }
    };
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
    $("theme").addEventListener("click", () => draw());
    const theme = document.documentElement.dataset;
    let before = null;
    addEventListener("beforeprint", () => { before = theme.theme; theme.theme = "light"; draw(680); });
    addEventListener("afterprint", () => { if (before) theme.theme = before; else delete theme.theme; draw(); });
  }

  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset;
    const dark = theme.theme ? theme.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    theme.theme = dark ? "light" : "dark";
  });

  (async () => {
    const data = JSON.parse(await unpack("data"));
    table(data.checkpoints);
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const library = document.createElement("script");
    library.textContent = await unpack("library");
    document.head.append(library);
    charts(data);
    document.documentElement.dataset.charted = String(Math.round(performance.now()));
  })();
})();
