/** f64 loops that say what the loss is. They share nothing with the native code. */
import type { CrossEntropyOptions } from './plan.js';

type Numbers = ArrayLike<number>;

/** hidden [n, hidden], weight [vocab, hidden], bias [vocab], labels and tokenWeights [n]. */
export interface ReferenceArgs extends CrossEntropyOptions {
  hidden: Numbers;
  weight: Numbers;
  bias?: Numbers | null;
  labels: Numbers;
  tokenWeights?: Numbers | null;
  numTokens?: number;
  n: number;
  width: number;
  vocab: number;
}

/** z_ij before and after the cap. */
function logits(o: ReferenceArgs, i: number): { raw: Float64Array; z: Float64Array } {
  const { hidden, weight, bias, width, vocab, logitScale = 1, softCap = 0 } = o;
  const raw = new Float64Array(vocab);
  const z = new Float64Array(vocab);
  for (let v = 0; v < vocab; v++) {
    let sum = bias ? (bias[v] as number) : 0;
    for (let j = 0; j < width; j++) sum += (hidden[i * width + j] as number) * (weight[v * width + j] as number);
    raw[v] = sum * logitScale;
    z[v] = softCap > 0 ? softCap * Math.tanh((raw[v] as number) / softCap) : (raw[v] as number);
  }
  return { raw, z };
}

const counted = (o: ReferenceArgs): number =>
  o.numTokens ?? Math.max(1, Array.from(o.labels).filter((y) => y !== (o.ignoreIndex ?? -100)).length);

/** The loss: mean over `numTokens`. */
export function forward(o: ReferenceArgs): number {
  const { n, vocab, labels, tokenWeights, ignoreIndex = -100, labelSmoothing: eps = 0, zLoss = 0 } = o;
  let total = 0;
  for (let i = 0; i < n; i++) {
    const y = labels[i] as number;
    if (y === ignoreIndex) continue;
    const { z } = logits(o, i);
    const max = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
    const lse = max + Math.log(z.reduce((sum, v) => sum + Math.exp(v - max), 0));
    const mean = z.reduce((a, b) => a + b, 0) / vocab;
    total +=
      (tokenWeights ? (tokenWeights[i] as number) : 1) * ((1 - eps) * (lse - (z[y] as number)) + eps * (lse - mean) + zLoss * lse * lse);
  }
  return total / counted(o);
}

/** Its gradients. */
export function backward(o: ReferenceArgs): { dHidden: Float64Array; dWeight: Float64Array; dBias: Float64Array } {
  const {
    hidden,
    weight,
    n,
    width,
    vocab,
    labels,
    tokenWeights,
    ignoreIndex = -100,
    labelSmoothing: eps = 0,
    zLoss = 0,
    softCap = 0,
    logitScale = 1,
  } = o;
  const dHidden = new Float64Array(n * width);
  const dWeight = new Float64Array(vocab * width);
  const dBias = new Float64Array(vocab);
  for (let i = 0; i < n; i++) {
    const y = labels[i] as number;
    if (y === ignoreIndex) continue;
    const { raw, z } = logits(o, i);
    const max = z.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
    const sum = z.reduce((acc, v) => acc + Math.exp(v - max), 0);
    const lse = max + Math.log(sum);
    const scale = ((tokenWeights ? (tokenWeights[i] as number) : 1) / counted(o)) * logitScale;
    for (let v = 0; v < vocab; v++) {
      let g = (Math.exp((z[v] as number) - max) / sum) * (1 + 2 * zLoss * lse) - eps / vocab - (v === y ? 1 - eps : 0);
      if (softCap > 0) g *= 1 - Math.tanh((raw[v] as number) / softCap) ** 2;
      g *= scale;
      dBias[v] = (dBias[v] as number) + g;
      for (let j = 0; j < width; j++) {
        dHidden[i * width + j] = (dHidden[i * width + j] as number) + g * (weight[v * width + j] as number);
        dWeight[v * width + j] = (dWeight[v * width + j] as number) + g * (hidden[i * width + j] as number);
      }
    }
  }
  return { dHidden, dWeight, dBias };
}
