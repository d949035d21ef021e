"use strict";
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const font = () => ({ family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") });
  // Okabe and Ito's colours, told apart by colour-blind eyes too.
  const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"];
  const NAMED = { ours: "#0072b2", baseline: "#b0459f", "mean hand": "#808080" };  // as in the pictures
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function axis(title) {
    return { title: { text: title }, gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true };
  }

  function drawChart(element) {
    const chart = payload.charts.find((one) => one.id === element.dataset.chart);
    const traces = chart.traces.map((trace, i) => ({
      ...trace, type: "scatter", mode: chart.x === "epoch" ? "lines+markers" : "lines",
      line: { color: NAMED[trace.name] || LINES[i % LINES.length], width: 2, dash: i < LINES.length ? "solid" : "dot", shape: chart.id === "distribution" ? "hv" : "linear" },
      marker: { size: 6 },
    }));
    const layout = {
      title: { text: chart.title, x: 0, xref: "paper", font: { size: 14 } }, font: font(), height: 340,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 50, r: 10, t: 36, b: 40 },
      xaxis: axis(chart.x), yaxis: { ...axis(chart.y), type: chart.log ? "log" : "linear", rangemode: chart.log ? "normal" : "tozero" },
      showlegend: traces.length > 1, hovermode: "closest",
      // Beside the curves where there are many, else in a corner that curves leave free.
      legend: traces.length > 4 ? { x: 1.02, y: 1 } : { x: 1, xanchor: "right", y: 0, bgcolor: "rgba(0,0,0,0)" },
    };
    if (chart.log) layout.yaxis.dtick = 1;
    if (chart.x === "epoch") { layout.xaxis.tickformat = "d"; layout.xaxis.rangemode = "tozero"; }
    return Plotly.react(element, traces, layout, CONFIG);
  }

  // Meshes -------------------------------------------------------------------------------------------------

  const HANDS = payload.hands.map((hand, i) => {
    const position = payload.hands.slice(0, i).filter((other) => other.kind === hand.kind).length;
    return { ...hand, id: (hand.kind === "grid" ? "g" : "f") + position };
  });
  const viewer = byId("viewer"), handChoice = byId("hand"), meshChoice = byId("mesh"), ghost = byId("ghost");
  const FRONT = { eye: { x: 0, y: 0, z: -2 }, up: { x: 0, y: -1, z: 0 }, center: { x: 0, y: 0, z: 0 }, projection: { type: "perspective" } };

  function bytes(text) {
    const raw = atob(text), result = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) result[i] = raw.charCodeAt(i);
    return result.buffer;
  }

  function unpack(mesh) {
    if (mesh.x) return mesh;
    const points = Array.from(new Int16Array(bytes(mesh.points)), (value) => value / 20);
    for (const [offset, name] of ["x", "y", "z"].entries()) mesh[name] = points.filter((_, i) => i % 3 === offset);
    mesh.error = mesh.errors && Array.from(new Uint16Array(bytes(mesh.errors)), (value) => value / 100);
    return mesh;
  }

  const FACES = {};
  function faces(count) {
    FACES[count] ||= Object.fromEntries(["i", "j", "k"].map((name, at) => [name, payload.faces[count].map((face) => face[at])]));
    return FACES[count];
  }

  // Good vertices look like grey clay on light and on dark paper.
  const SCALE = [[0, "#d5dbe3"], [0.3, "#f0c75e"], [0.65, "#e2622f"], [1, "#8a1038"]];
  // One range for all hands, so that colours compare: up to the 95th percentile of our errors on the page.
  const LARGEST = (() => {
    const all = HANDS.flatMap((hand) => hand.meshes.filter((mesh) => mesh.key.startsWith("ours") && mesh.count === 778).flatMap((mesh) => unpack(mesh).error));
    all.sort((a, b) => a - b);
    return Math.max(5, Math.ceil(all[Math.floor(0.95 * (all.length - 1))] || 0));
  })();

  function trace(mesh) {
    const { x, y, z } = unpack(mesh);
    const light = { ambient: 0.55, diffuse: 0.6, specular: 0.08, roughness: 0.7, fresnel: 0.05 };
    const common = { type: "mesh3d", x, y, z, ...faces(mesh.count), lighting: light, lightposition: { x: -400, y: -700, z: -900 }, flatshading: mesh.count < 778 };
    if (!mesh.error) return { ...common, color: "#7cab5f", hoverinfo: "skip", showscale: false };
    return {
      ...common, intensity: mesh.error, cmin: 0, cmax: LARGEST, colorscale: SCALE,
      text: mesh.error.map((value) => value.toFixed(1) + " mm"), hovertemplate: "%{text}<extra></extra>",
      colorbar: { title: { text: "error, mm", side: "right" }, thickness: 12, len: 0.85, outlinewidth: 0 },
    };
  }

  const chosenHand = () => HANDS.find((hand) => hand.id === handChoice.value);
  const chosenMesh = () => chosenHand().meshes.find((mesh) => mesh.key === meshChoice.value);
  // Plotly tells of turns by mouse, not by touch, so its scene is asked.
  const camera = () => viewer._fullLayout?.scene?._scene?.getCamera() || FRONT;
  const look = (from) => Plotly.relayout(viewer, { "scene.camera": from });

  function show() {
    const hand = chosenHand(), mesh = chosenMesh();
    const traces = [trace(mesh)];
    if (ghost.checked && mesh.key !== "truth") {
      const truth = hand.meshes.find((other) => other.key === "truth");
      traces.push({ ...trace(truth), opacity: 0.35 });
    }
    const hidden = { visible: false, showspikes: false };
    const layout = {
      font: font(), margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      scene: { xaxis: hidden, yaxis: hidden, zaxis: hidden, aspectmode: "data", dragmode: "orbit", camera: camera(), bgcolor: "rgba(0,0,0,0)" },
    };
    const words = mesh.mean === null ? "the true mesh" : `mean error ${mesh.mean.toFixed(1)} mm, largest ${mesh.worst.toFixed(1)} mm`;
    byId("readout").textContent = `Image ${hand.index}, ${mesh.label}: ${words}.`;
    for (const button of document.querySelectorAll(".pick")) {
      button.setAttribute("aria-pressed", String(button.dataset.hand === hand.id && button.dataset.mesh === mesh.key));
    }
    return Plotly.react(viewer, traces, layout, { ...CONFIG, displayModeBar: false });
  }

  function offerMeshes(wanted) {
    const meshes = chosenHand().meshes;
    meshChoice.replaceChildren(...meshes.map((mesh) => new Option(mesh.label, mesh.key)));
    if (meshes.some((mesh) => mesh.key === wanted)) meshChoice.value = wanted;
  }

  function turn(right, down) {
    // Rotates the eye about the view's own axes, so that no direction is a pole.
    const { eye, up, ...rest } = camera();
    const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
    const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
    const unit = (a) => a.map((value) => value / Math.hypot(...a));
    const rotate = (v, n, angle) => {
      const c = Math.cos(angle), s = Math.sin(angle), w = cross(n, v), along = dot(n, v) * (1 - c);
      return v.map((value, i) => value * c + w[i] * s + n[i] * along);
    };
    let position = [eye.x, eye.y, eye.z];
    const out = unit(position);
    let top = [up.x, up.y, up.z];
    top = unit(top.map((value, i) => value - dot(top, out) * out[i]));
    position = rotate(position, top, right);
    const side = unit(cross(top, position));
    [position, top] = [rotate(position, side, down), rotate(top, side, down)];
    const point = ([x, y, z]) => ({ x, y, z });
    look({ ...rest, eye: point(position), up: point(top) });
  }

  function start() {
    for (const [kind, label] of [["grid", "reconstructions"], ["failure", "failures"]]) {
      const options = HANDS.filter((hand) => hand.kind === kind).map((hand) => new Option(`image ${hand.index}`, hand.id));
      if (!options.length) continue;
      const group = document.createElement("optgroup");
      group.label = label;
      group.append(...options);
      handChoice.append(group);
    }
    offerMeshes();
    handChoice.addEventListener("change", () => { offerMeshes(meshChoice.value); show(); });
    meshChoice.addEventListener("change", show);
    ghost.addEventListener("change", show);
    byId("reset").addEventListener("click", () => look(FRONT));
    const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    viewer.addEventListener("keydown", (event) => {
      const step = KEYS[event.key];
      if (!step) return;
      event.preventDefault();
      turn(step[0] * 0.2, step[1] * 0.2);
    });
    for (const button of document.querySelectorAll(".pick")) {
      button.addEventListener("click", () => {
        handChoice.value = button.dataset.hand;
        offerMeshes(button.dataset.mesh);
        show();
        const box = viewer.getBoundingClientRect();
        if (box.bottom < 0 || box.top > innerHeight) byId("viewer-box").scrollIntoView();
      });
    }
    return show();
  }

  function drawCharts() {
    return Promise.all([...document.querySelectorAll(".chart")].map(drawChart));
  }

  Promise.all([start(), drawCharts()]).then(() => { document.documentElement.dataset.ready = "yes"; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawCharts(); show(); });
})();
