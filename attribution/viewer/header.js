// The headline with the scores, and the legend.

function drawHeader(model) {
  const { metadata } = model;
  const [first, ...others] = metadata.targets;
  const probability = first.probability === null ? "" : `probability ${percent(first.probability)}`;
  document.getElementById("title").replaceChildren(
    "Target ", element("strong", {}, `\u201c${tokenText(first.label)}\u201d`), " ", element("small", {}, probability),
  );
  const kind = { logit: "Next-token logit", difference: "Logit difference", feature: "Feature" }[first.kind];
  const more = others.length ? ` and ${others.length} more target${others.length > 1 ? "s" : ""}` : "";
  const name = metadata.scan.split("/").slice(-2).join("/");
  document.getElementById("subtitle").textContent =
    `${kind}${more}. Model ${name}, ${metadata.n_layers} layers; `
    + `transcoder ${metadata.transcoder.slice(0, 12)}.`;
  document.getElementById("scores").replaceChildren(...metadata.scores.map(drawScore));
}

function drawScore(score) {
  return element(
    "div", { class: "score", title: score.definition },
    element("dt", {}, score.name),
    element("dd", { class: "value" }, scoreText(score)),
    element("dd", { class: "reading" }, score.reading),
  );
}

function scoreText(score) {
  if (score.value === null) return "not measured";
  return score.unit === "share" ? percent(score.value) : score.value.toExponential(1);
}

function drawLegend(model) {
  const symbols = Object.entries({
    feature: "feature", error: "error (MLP output minus transcoder output)", bias: "bias", text: "token",
    image: "patch",
  }).map(([kind, name]) => key(symbolOf(kind), name));
  const edges = ["positive", "negative"].map((sign) => key(edgeSample(sign), `${sign} edge`));
  const ramp = key(element("span", { class: "ramp" }), `influence 0 to ${percent(model.top)} (square-root scale)`);
  document.getElementById("legend").replaceChildren(
    element("div", { class: "keys" }, ...symbols, ...edges, ramp), describeScope(model.metadata.counts),
  );
}

function key(symbol, name) {
  return element("span", { class: "key" }, symbol, name);
}

function symbolOf(kind) {
  const shape = shapeOf({ top: 1 }, { kind, path_share: 0.08 }, { size: 11 });
  return svg("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true" }, ...shape);
}

function edgeSample(sign) {
  const dashes = sign === "negative" ? NEGATIVE_DASH : null;
  const line = svg("path", { class: sign, d: "M1 6 H25", "stroke-width": 3, "stroke-dasharray": dashes });
  return svg("svg", { width: 26, height: 12, "aria-hidden": "true", class: "edges" }, line);
}

function describeScope(counts) {
  const nodes = `${grouped(counts.nodes_shown)} of ${grouped(counts.nodes_total)} nodes`;
  const links = `${grouped(counts.links_shown)} of ${grouped(counts.links_total)} edges`;
  const left = grouped(counts.inner_left_out);
  const cap = ` max_nodes reached: ${left} more features, errors and biases that pruning kept are not on this page.`;
  return element(
    "p", {},
    `This page shows the most influential ${nodes} and ${links}. Edge width: share of its target\u2019s input.`,
    counts.inner_left_out > 0 ? element("strong", {}, cap) : null,
  );
}
