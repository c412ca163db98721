// The panel of the selected node: its properties, the origin of its input, its edges.

const LIST_LENGTH = 40;

const KIND_NAMES = {
  feature: "feature", error: "error node", text: "text token", image: "image patch", bias: "bias", logit: "target",
};

const ORIGIN_NAMES = {
  image: "image", text: "text", error: "errors", feature: "features whose inputs are not shown", pruned: "pruned",
};

const HELP = [
  "An edge is the amount that its source adds to its target\u2019s value, with attention patterns and norm "
    + "denominators frozen at their values on this prompt.",
  "Select a node to see its inputs and outputs; picture and prompt then show the patches and tokens that contribute to "
    + "it. Select a patch or a token to see its outputs.",
  "Keys: arrows move, Enter selects, P pins, Escape clears the selection.",
];

function drawDetails(model, node, pinned) {
  const panel = document.getElementById("details");
  panel.replaceChildren(...(node ? describeNode(model, node, pinned) : describeNothing(model)));
  panel.scrollTop = 0;
}

function describeNothing(model) {
  const top = model.inner.filter((node) => node.rank).slice(0, 20).map((node) => nodeButton(model, node, {
    value: percent(node.path_share), length: Math.min(1, node.path_share / model.top), tone: "unsigned",
  }));
  return [
    element("h2", {}, "How to read this page"), ...HELP.map((text) => element("p", {}, text)),
    element("h3", {}, "Most influential"), element("ol", { class: "edge-list" }, ...top),
  ];
}

function describeNode(model, node, pinned) {
  const isPinned = pinned.has(node);
  const pin = element("button", { type: "button", class: "pin", "aria-pressed": isPinned }, isPinned ? "Unpin" : "Pin");
  const facts = factsOf(model, node).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
  return [
    element("div", { class: "details-head" }, element("h2", {}, shortName(model, node)), pin),
    element("dl", { class: "facts" }, ...facts),
    ...describeOrigins(model, node),
    ...describeInputs(model, node),
    ...describeOutputs(model, node),
  ];
}

function factsOf(model, node) {
  const facts = [["kind", KIND_NAMES[node.kind]], ["place", placeOf(model, node)]];
  if (node.kind === "feature") facts.push(["feature", `layer ${node.layer}, number ${node.feature_index}`]);
  if (node.kind !== "logit") {
    const rank = node.rank ? ` (rank ${node.rank})` : "";
    facts.push(["influence", `${percent(node.path_share)} of all paths${rank}`]);
  }
  const value = { feature: "activation", logit: "value" }[node.kind] ?? "vector length";
  facts.push([value, node.activation.toPrecision(4)]);
  if (node.token_prob !== null) facts.push(["probability", percent(node.token_prob)]);
  if (node.box) facts.push(["pixels", node.box.map((edge) => Number(edge.toFixed(1))).join(", ")]);
  facts.push(["name", element("code", {}, node.name)]);
  return facts;
}

function describeOrigins(model, node) {
  const origins = originsOf(model, node);
  if (!origins) return [];
  const parts = Object.keys(ORIGIN_NAMES).filter((kind) => origins[kind] >= 0.0005);
  const bar = element("div", { class: "origin-bar", "aria-hidden": "true" });
  const words = element("ul", { class: "origin-words" });
  for (const kind of parts) {
    const part = element("span", { class: `origin-${kind}` });
    part.style.flexGrow = origins[kind];
    bar.append(part);
    words.append(element("li", { class: `origin-${kind}` }, `${ORIGIN_NAMES[kind]} ${percent(origins[kind])}`));
  }
  return [element("h3", {}, "Origin of its input, over all paths"), bar, words];
}

function describeInputs(model, node) {
  if (node.inputs.length === 0) return [element("h3", {}, "Inputs"), element("p", {}, whyNoInputs(node))];
  const kept = node.inputs.reduce((sum, link) => sum + (link.from.kind === "bias" ? 0 : link.share), 0);
  return describeLinks(model, "Inputs", node.inputs, (link) => link.from, `, ${percent(kept)} of its input`);
}

function describeOutputs(model, node) {
  if (node.kind === "logit") return [];
  if (node.outputs.length > 0) return describeLinks(model, "Outputs", node.outputs, (link) => link.to, "");
  const why = "All of its outgoing edges are pruned, or lead to nodes that are not on this page.";
  return [element("h3", {}, "Outputs"), element("p", {}, why)];
}

function whyNoInputs(node) {
  if (node.kind !== "feature" && node.kind !== "logit") return "Tokens, patches, errors and biases have no inputs.";
  if (node.has_row) return "All of its incoming edges are pruned, or come from nodes that are not on this page.";
  return "Its inputs were not computed (setting max_feature_nodes).";
}

function describeLinks(model, title, links, other, remark) {
  const largest = Math.abs(links[0].weight) || 1;
  const list = element("ol", { class: "edge-list" });
  const show = (shown) => list.replaceChildren(...shown.map((link) => nodeButton(model, other(link), {
    value: signed(link.weight),
    length: Math.abs(link.weight) / largest,
    tone: link.weight < 0 ? "negative" : "positive",
    title: `${percent(link.share)} of the target\u2019s input`,
  })));
  show(links.slice(0, LIST_LENGTH));
  const count = `${links.length} edge${links.length > 1 ? "s" : ""}${remark}`;
  const parts = [element("h3", {}, `${title} `, element("small", {}, count)), list];
  if (links.length > LIST_LENGTH) {
    const more = element("button", { type: "button", class: "more" }, `Show all ${links.length}`);
    more.addEventListener("click", () => { show(links); more.remove(); });
    parts.push(more);
  }
  return parts;
}

// A line of a list: a button that selects a node, with its name, a value, and a bar under both.
function nodeButton(model, node, { value, length, tone, title = "" }) {
  const bar = element("span", { class: `bar ${tone}`, "aria-hidden": "true" });
  bar.style.width = `${(100 * length).toFixed(1)}%`;
  const symbol = symbolOf(node.kind === "logit" ? "feature" : node.kind);
  const name = element("span", { class: "edge-name", title: fullName(model, node) }, symbol, listName(model, node));
  const weight = element("span", { class: "edge-weight" }, value);
  return element("li", {}, element("button", { type: "button", "data-id": node.node_id, title }, name, weight, bar));
}
