/** What `plan` of `@lc/vram-probe` wants to know of a loaded model. */
import type { CausalLM } from '@lc/models';
import { LoraExpertLinear, LoraLinear, QuantizedExpertLinear, QuantizedLinear } from '@lc/qlora';
import type { DType, ExpertLinear, Linear } from '@lc/tensor';
import type { LoraShape, ModelShape } from '@lc/vram-probe';

/** Dimensions of a model. */
export function shapeOf({ config: c }: CausalLM): ModelShape {
  return {
    numHiddenLayers: c.layers.length,
    hiddenSize: c.hiddenSize,
    numAttentionHeads: c.numAttentionHeads,
    numKeyValueHeads: c.numKeyValueHeads,
    headDim: c.headDim,
    intermediateSize: c.moe ? c.moe.intermediateSize : c.intermediateSize,
    numExperts: c.moe?.numExperts ?? 0,
    numExpertsPerTok: c.moe?.numExpertsPerTok ?? 0,
    vocabSize: c.vocabSize,
    tieWordEmbeddings: c.tieWordEmbeddings,
    qkNorm: c.qkNorm,
    fullAttentionLayers: c.layers.filter(({ window }) => window === null).length,
  };
}

/** The adapter on a model, or rank 1 of nothing. */
export function loraOf(model: CausalLM): LoraShape {
  const config = model.adapterConfig;
  const names = new Set(model.parameters.map((p) => p.name.match(/\.(\w+_proj)\.lora_[AB]\.weight$/)?.[1] ?? ''));
  names.delete('');
  return { r: config?.r ?? 1, dropout: config?.loraDropout ?? 0, targets: [...names, ...(config?.targetParameters ?? [])] };
}

function isPlain(linear: Linear | ExpertLinear, dtype: DType): boolean {
  if (linear instanceof LoraLinear || linear instanceof LoraExpertLinear) return isPlain(linear.base, dtype);
  if (linear instanceof QuantizedLinear || linear instanceof QuantizedExpertLinear) return linear.weight.plain(dtype) !== null;
  return true;
}

/** Whether layers dequantize (or convert) their weights when they open. */
export function isPrepared(model: CausalLM, dtype: DType): boolean {
  const linears = [...model.linearModules.map((m) => m.linear), ...model.expertModules.map((m) => m.experts)];
  return linears.some((linear) => !isPlain(linear, dtype));
}
