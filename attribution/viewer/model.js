// The graph as data: neighbours, ranks and shares along paths. Nothing is drawn here.

function readDocument() {
  return JSON.parse(document.getElementById("graph-data").textContent);
}

function buildModel(source) {
  const { metadata } = source;
  const nodes = source.nodes.map((node) => ({ ...node, row: rowOf(node, metadata.n_layers), inputs: [], outputs: [] }));
  const byId = new Map(nodes.map((node) => [node.node_id, node]));
  const links = source.links.map((link) => ({ ...link, from: byId.get(link.source), to: byId.get(link.target) }));
  for (const link of links) {
    // Share of the targets' influence that flows over this edge: comparable between rows, so edges are ranked by it.
    link.score = link.share * (link.to.kind === "logit" ? link.to.target_weight : link.to.path_share);
    link.to.inputs.push(link);
    link.from.outputs.push(link);
  }
  for (const node of nodes) {
    node.inputs.sort(byWeight);
    node.outputs.sort(byWeight);
  }
  links.sort((a, b) => b.score - a.score);
  const inner = nodes.filter((node) => isInner(node)).sort((a, b) => b.path_share - a.path_share);
  inner.filter((node) => node.kind !== "bias").forEach((node, index) => { node.rank = index + 1; });
  const tokenAt = new Map(nodes.filter((node) => node.kind === "text").map((node) => [node.ctx_idx, node]));
  const patches = metadata.images.map(() => new Map());
  for (const node of nodes) {
    if (node.kind === "image") patches[node.image].set(patchKey(node.patch_row, node.patch_col), node);
  }
  const top = Math.max(1e-12, ...nodes.map((node) => (node.kind === "bias" ? 0 : node.path_share)));
  return { metadata, nodes, byId, links, inner, tokenAt, patches, top, qParams: source.qParams };
}

function patchKey(row, col) {
  return `${row},${col}`;
}

function byWeight(a, b) {
  return Math.abs(b.weight) - Math.abs(a.weight);
}

// Bottom row 0: what enters the model. Rows 1 to L: its layers. Row L + 1: the targets.
function rowOf(node, layers) {
  if (node.kind === "logit") return layers + 1;
  return node.layer === "E" ? 0 : Number(node.layer) + 1;
}

function isInner(node) {
  return node.kind === "feature" || node.kind === "error" || node.kind === "bias";
}

function isOrigin(node) {
  return node.inputs.length === 0;
}

// Share of a node's input that reaches it from every other node, over all paths of this page: products of the shares
// of the edges, summed. An edge's source always lies in a lower row than its target, so one sweep downwards suffices.
function sharesInto(model, node) {
  const share = new Map([[node, 1]]);
  const order = model.nodes.filter((other) => other.inputs.length > 0).sort((a, b) => b.row - a.row);
  for (const target of order) {
    const weight = share.get(target);
    if (!weight) continue;
    for (const link of target.inputs) share.set(link.from, (share.get(link.from) || 0) + weight * link.share);
  }
  share.delete(node);
  return share;
}

// Values of patches and tokens that the picture and the prompt show for a node.
function valuesInto(model, node, mode) {
  if (mode === "direct") return new Map(node.inputs.map((link) => [link.from, link.weight]));
  return sharesInto(model, node);
}

// Origin of a node's input over all paths, as shares of the input without biases; they sum to 1 with the pruned part.
function originsOf(model, node) {
  const sums = { image: 0, text: 0, feature: 0, error: 0 };
  if (node.inputs.length === 0) return null;
  for (const [origin, share] of sharesInto(model, node)) {
    if (isOrigin(origin) && origin.kind !== "bias") sums[origin.kind] += share;
  }
  const shown = Object.values(sums).reduce((a, b) => a + b, 0);
  return { ...sums, pruned: Math.max(0, 1 - shown) };
}

function tokenText(text) {
  if (text === "") return "(empty)";
  return text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ +$/, (run) => "\u2423".repeat(run.length));
}

function imageName(model, image) {
  return model.metadata.images.length > 1 ? `image ${image}` : "image";
}

// Names the image of a patch where there are several.
function ofImage(model, at) {
  return model.metadata.images.length > 1 ? ` of image ${at.image}` : "";
}

function placeOf(model, node) {
  if (node.kind === "bias") return "all positions";
  const at = model.metadata.positions[node.ctx_idx];
  if (at.image !== null) {
    return `${imageName(model, at.image)}, row ${at.patch_row}, column ${at.patch_col}`;
  }
  return `\u201c${tokenText(model.metadata.prompt_tokens[node.ctx_idx])}\u201d (position ${node.ctx_idx})`;
}

function shortName(model, node) {
  switch (node.kind) {
    case "feature": return node.clerp || `L${node.layer} feature ${node.feature_index}`;
    case "error": return `L${node.layer} error`;
    case "bias": return node.clerp;
    case "logit": return `target \u201c${tokenText(node.clerp)}\u201d`;
    case "image": return `patch ${node.patch_row},${node.patch_col}${ofImage(model, node)}`;
    default: return `token \u201c${tokenText(model.metadata.prompt_tokens[node.ctx_idx])}\u201d`;
  }
}

// A name for lists, short enough for one line.
function listName(model, node) {
  if (node.kind !== "feature" && node.kind !== "error") return shortName(model, node);
  const at = model.metadata.positions[node.ctx_idx];
  const place = at.image === null
    ? `\u201c${tokenText(model.metadata.prompt_tokens[node.ctx_idx])}\u201d ${node.ctx_idx}`
    : `patch ${at.patch_row},${at.patch_col}${ofImage(model, at)}`;
  const isUnlabelled = node.kind === "feature" && !node.clerp;
  return `${isUnlabelled ? `L${node.layer} f${node.feature_index}` : shortName(model, node)} \u00b7 ${place}`;
}

function fullName(model, node) {
  const name = shortName(model, node);
  if (node.kind === "bias" || node.kind === "image") return name;
  return node.kind === "text" ? `${name} (position ${node.ctx_idx})` : `${name} at ${placeOf(model, node)}`;
}

function percent(value) {
  if (value === null || Number.isNaN(value)) return "n/a";
  const hundredths = 100 * value;
  if (hundredths !== 0 && Math.abs(hundredths) < 0.1) return "< 0.1 %";
  if (hundredths > 99.9 && hundredths < 100) return hundredths > 99.99 ? "> 99.99 %" : `${hundredths.toFixed(2)} %`;
  return `${hundredths.toFixed(hundredths >= 100 ? 0 : 1)} %`;
}

function grouped(count) {
  return count.toLocaleString("en-US");
}

function signed(value) {
  const text = Math.abs(value) >= 1e-3 || value === 0 ? Math.abs(value).toFixed(3) : Math.abs(value).toExponential(1);
  return (value < 0 ? "\u2212" : "+") + text;
}
