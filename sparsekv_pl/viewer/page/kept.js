"use strict";

const OCTAVES = 32, STEPS = 2 ** 16 - 2; // as in compact_arrays.py

/** What was kept: bits and masses (layers, heads, tokens) of one case. */
class Kept {
  constructor(content, bytes) {
    this.layers = content.layers;
    this.heads = content.heads;
    this.tokens = content.tokens.length;
    this.bytes = bytes;
    this.setBytes = Math.ceil((this.layers * this.heads * this.tokens) / 8);
    this.masses = content.mass ? this.decodedMasses(content.sets * this.setBytes) : null;
  }

  static async of(content) {
    const raw = Uint8Array.from(atob(content.data), (letter) => letter.charCodeAt(0));
    const inflated = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Kept(content, new Uint8Array(await new Response(inflated).arrayBuffer()));
  }

  decodedMasses(start) {
    const view = new DataView(this.bytes.buffer, start);
    return Float64Array.from({ length: this.layers * this.heads * this.tokens }, (_, i) => {
      const code = view.getUint16(2 * i, true);
      return code ? 2 ** (OCTAVES * ((code - 1) / STEPS - 1)) : 0;
    });
  }

  /** Indices layer * heads + head of the chosen heads; null chooses all. */
  chosen(layer, head) {
    const all = Array.from({ length: this.layers * this.heads }, (_, i) => i);
    return all.filter((i) => (layer === null || Math.floor(i / this.heads) === layer) &&
      (head === null || i % this.heads === head));
  }

  holds(set, index, token) {
    const bit = index * this.tokens + token;
    return (this.bytes[set * this.setBytes + (bit >> 3)] >> (7 - (bit & 7))) & 1;
  }

  /** How many of the chosen heads keep each token. */
  counts(set, chosen) {
    const counts = new Uint32Array(this.tokens);
    for (const index of chosen)
      for (let token = 0; token < this.tokens; token++) counts[token] += this.holds(set, index, token);
    return counts;
  }

  /** The teacher's mass on each token, a mean over the chosen heads. */
  mass(chosen) {
    const mass = new Float64Array(this.tokens);
    for (const index of chosen)
      for (let token = 0; token < this.tokens; token++) mass[token] += this.masses[index * this.tokens + token];
    return mass.map((sum) => sum / chosen.length);
  }

  /** The share of these tokens that a head keeps. */
  shareOfTokens(set, index, tokens) {
    return tokens.reduce((sum, token) => sum + this.holds(set, index, token), 0) / tokens.length;
  }

  /** The share of the teacher's mass on the context that a head keeps. */
  shareOfMass(set, index) {
    let kept = 0, whole = 0;
    for (let token = 0; token < this.tokens; token++) {
      const mass = this.masses[index * this.tokens + token];
      whole += mass;
      kept += this.holds(set, index, token) * mass;
    }
    return whole ? kept / whole : 0;
  }
}

/** Ranks, 1 for the largest; equal values share the first rank. */
function ranks(values) {
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a]);
  const found = new Uint32Array(values.length);
  order.forEach((token, place) => {
    const before = order[place - 1];
    found[token] = place && values[before] === values[token] ? found[before] : place + 1;
  });
  return found;
}
