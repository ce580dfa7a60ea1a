/**
 * What a decoder layer of `@lc/models` takes from the workspace, allocation by allocation: `open` for the whole sequence, and the most that a call on one
 * chunk holds at once. `test/memory` runs the real sequence of allocations and holds these formulas to it.
 */
import { attentionWorkspaceBytes } from '@lc/attention';
import type { ModelShape } from './shape.js';
import type { LoraShape } from './types.js';

/** A workspace hands out whole 256 bytes. */
const align = (bytes: number): number => Math.ceil(bytes / 256) * 256;
const sum = (...sizes: number[]): number => sizes.reduce((total, bytes) => total + align(bytes), 0);

export interface LayerSizes {
  model: ModelShape;
  lora: LoraShape | undefined;
  device: 'cpu' | 'cuda';
  /** Bytes of an activation. */
  act: number;
  tokens: number;
  chunk: number;
  tile: number;
  /** As for `attentionBackward`. Default true. */
  deterministic?: boolean | undefined;
}

const has = (lora: LoraShape | undefined, name: string): boolean => (lora?.targets ?? []).some((target) => target.endsWith(name));

/** A LoRA's low-rank intermediates: one going forward, two going back; with dropout, its input once more. */
function loraBytes(s: LayerSizes, rows: number, width: number, backward: boolean): number {
  const { r, dropout } = s.lora ?? { r: 16, dropout: 0 };
  const low = 4 * rows * r;
  const dropped = dropout === 0 ? 0 : rows * width * s.act;
  return backward ? sum(low, low, dropped) : sum(low, dropped);
}

/** The MLP block on a chunk: norm, and the most that one tile holds. */
function mlpBytes(s: LayerSizes, backward: boolean): number {
  const { model: m, act, lora } = s;
  const t = Math.min(s.tile, s.chunk);
  const [h, i] = [m.hiddenSize, m.intermediateSize];
  const block = backward ? sum(t * h * act, t * h * act) : sum(t * h * act); // the normed input, and its gradient
  if (m.numExperts === 0) {
    const many = backward ? 4 : 3; // gate, up, activation, and the activation's gradient
    const adapted = ['gate_proj', 'up_proj', 'down_proj'].some((name) => has(lora, name));
    return block + many * align(t * i * act) + (adapted ? loraBytes(s, t, Math.max(h, i), backward) : 0);
  }
  const rows = t * m.numExpertsPerTok;
  const routing = sum(4 * t * m.numExperts, 4 * rows, 4 * rows, 4 * rows, 4 * rows, 4 * (m.numExperts + 1));
  const both = sum(rows * h * act, rows * 2 * i * act); // rows by expert, gate and up
  const gradients = backward ? sum(rows * h * act, rows * i * act, 4 * t * m.numExperts) : 0; // of rows and activation, and of the logits
  // The activation; backward needs of it a number per row where the down projection trains nothing.
  const activation = backward && !has(lora, 'experts.down_proj') ? sum(4 * rows) : sum(rows * i * act);
  return block + routing + both + activation + gradients + expertLora(s, rows, backward);
}

function expertLora(s: LayerSizes, rows: number, backward: boolean): number {
  const { model: m, lora } = s;
  const outs = [...(has(lora, 'gate_up_proj') ? [2 * m.intermediateSize] : []), ...(has(lora, 'experts.down_proj') ? [m.hiddenSize] : [])];
  if (!lora || outs.length === 0) return 0;
  const low = 4 * rows * lora.r;
  return backward ? sum(low, low, 4 * m.numExperts * lora.r * Math.max(...outs)) : sum(low);
}

/** B of LoRAs over fused experts, regrouped by expert while the layer is open. */
export function openLoraBytes(s: LayerSizes): number {
  const { model: m, lora } = s;
  if (!lora) return 0;
  const of = (name: string, out: number): number => (has(lora, name) ? align(4 * m.numExperts * lora.r * out) : 0);
  return m.numExperts === 0 ? 0 : of('gate_up_proj', 2 * m.intermediateSize) + of('experts.down_proj', m.hiddenSize);
}

/** The most that `forward` or `backward` of a layer holds at once beyond what `open` took. */
export function layerWorkBytes(s: LayerSizes): number {
  const { model: m, act, device } = s;
  const n = Math.min(s.chunk, s.tokens);
  const [h, heads] = [m.hiddenSize, m.numAttentionHeads];
  const [q, kv] = [heads * m.headDim, m.numKeyValueHeads * m.headDim];
  const scratch = attentionWorkspaceBytes({
    ...{ heads, kvHeads: m.numKeyValueHeads, headDim: m.headDim, window: null, device, deterministic: s.deterministic ?? true },
    ...{ tokens: n, start: s.tokens - n }, // the last chunk sees the most keys, and takes the most scratch
  });
  const kept = sum(n * q * act, 4 * n * heads); // attention output and log-sum-exp
  const normed = align(n * h * act);
  const query = align(n * q * act);
  const forward =
    kept +
    normed + // h
    Math.max(
      normed + Math.max(loraBytes(s, n, h, false), query + Math.max(loraBytes(s, n, h, false), scratch.forward)),
      loraBytes(s, n, q, false),
      mlpBytes(s, false),
    );
  const raw = m.qkNorm ? query : 0;
  const base = kept + normed + raw + query;
  const dkv = act === 4 ? 0 : 2 * align(n * kv * act); // dK and dV as the linears want them
  const rawK = m.qkNorm ? align(n * kv * act) : 0;
  const backward =
    base +
    Math.max(
      loraBytes(s, n, h, false),
      scratch.forward,
      normed + Math.max(loraBytes(s, n, q, false), mlpBytes(s, true)),
      query + loraBytes(s, n, q, true),
      2 * query + Math.max(scratch.backward, dkv + rawK + normed + loraBytes(s, n, h, true)),
    );
  return Math.max(forward, backward);
}
