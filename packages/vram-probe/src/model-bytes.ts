/** What a model's weights and adapters take, from its shape. */
import { LcTypeError } from '@lc/tensor';
import type { ModelShape } from './shape.js';
import type { LoraShape } from './types.js';

/** NF4 with double quantization takes 4.127 bits per weight, MXFP4 4.25; the rest is for norms, biases and routers. */
const FOUR_BIT_BYTES = 0.54;
const dtypeBytes = { f32: 4, bf16: 2 } as const;

/** Bytes of all base weights; and of one layer in the activations' dtype, 0 where the weights are kept in it. */
export function modelWeights(
  m: ModelShape,
  quantization: '4bit' | 'none',
  act: number,
  weights: 'f32' | 'bf16',
): { bytes: number; dequantized: number; experts: number } {
  const attention = m.hiddenSize * 2 * (m.numAttentionHeads + m.numKeyValueHeads) * m.headDim;
  const mlp = 3 * m.hiddenSize * m.intermediateSize * Math.max(1, m.numExperts);
  const embeddings = m.vocabSize * m.hiddenSize * (m.tieWordEmbeddings ? 1 : 2) * act;
  const perWeight = quantization === '4bit' ? FOUR_BIT_BYTES : dtypeBytes[weights];
  const prepared = quantization === '4bit' || dtypeBytes[weights] !== act ? act : 0;
  return {
    bytes: embeddings + Math.ceil((attention + mlp) * m.numHiddenLayers * perWeight),
    dequantized: (attention + mlp) * prepared,
    experts: m.numExperts > 0 ? mlp * prepared : 0,
  };
}

const EXPERTS = ['experts.gate_up_proj', 'experts.down_proj'];

/** [in, out] of every projection of a layer that a LoRA can be put over. */
function projections(m: ModelShape): Record<string, readonly [number, number]> {
  const [h, i] = [m.hiddenSize, m.intermediateSize];
  const [q, kv] = [m.numAttentionHeads * m.headDim, m.numKeyValueHeads * m.headDim];
  const attention = { q_proj: [h, q], k_proj: [h, kv], v_proj: [h, kv], o_proj: [q, h] } as const;
  if (m.numExperts > 0) return { ...attention, 'experts.gate_up_proj': [h, 2 * i], 'experts.down_proj': [i, h] };
  return { ...attention, gate_proj: [h, i], up_proj: [h, i], down_proj: [i, h] };
}

function targetsOf(m: ModelShape, lora: LoraShape | undefined): { name: string; inner: number; outer: number; copies: number }[] {
  const all = projections(m);
  return (lora?.targets ?? ['q_proj', 'k_proj', 'v_proj', 'o_proj']).map((target) => {
    const name = target.replace(/^mlp\./, '');
    const shape = all[name];
    if (!shape)
      throw new LcTypeError(
        'ERR_LC_ARGUMENT',
        `plan: lora.targets: '${target}' is not in this model, which has ${Object.keys(all).join(', ')}`,
      );
    return { name, inner: shape[0], outer: shape[1], copies: EXPERTS.includes(name) ? m.numExperts : 1 };
  });
}

/** Elements of all A [r, in] and B [out, r]. @throws ERR_LC_ARGUMENT for a target that the model does not have */
export function trainableParameters(m: ModelShape, lora: LoraShape | undefined): number {
  const perRank = targetsOf(m, lora).reduce((sum, t) => sum + t.copies * (t.inner + t.outer), 0);
  return m.numHiddenLayers * (lora?.r ?? 16) * perRank;
}
