import { LcError } from '@lc/tensor';

/** Dimensions of a decoder that decide its memory. */
export interface ModelShape {
  numHiddenLayers: number;
  hiddenSize: number;
  numAttentionHeads: number;
  numKeyValueHeads: number;
  headDim: number;
  /** Of one expert, in a mixture of experts. */
  intermediateSize: number;
  /** 0: a dense MLP. */
  numExperts: number;
  numExpertsPerTok: number;
  vocabSize: number;
  tieWordEmbeddings: boolean;
  /** RMSNorm over each head of Q and K (Qwen3). Default false. */
  qkNorm?: boolean;
  /** Layers without a window: those whose attention output is worth keeping. Default: all. */
  fullAttentionLayers?: number;
}

/** Layers without a window, where the config tells; else undefined, which counts all. */
function fullLayers(c: Record<string, unknown>): number | undefined {
  if (Array.isArray(c.layer_types)) return c.layer_types.filter((type) => type === 'full_attention').length;
  // gpt-oss alternates, the windowed layer first.
  return c.model_type === 'gpt_oss' && Number.isSafeInteger(c.num_hidden_layers)
    ? Math.floor((c.num_hidden_layers as number) / 2)
    : undefined;
}

/**
 * Reads a Hugging Face config.json (gpt-oss, Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE spellings).
 * @throws ERR_LC_CONFIG naming every field that is missing or no count
 */
export function modelShapeFromConfig(config: unknown): ModelShape {
  const c = (config !== null && typeof config === 'object' ? config : {}) as Record<string, unknown>;
  const problems: string[] = [];
  const count = (names: readonly string[], fallback?: number): number => {
    for (const name of names) {
      const value = c[name];
      if (value === undefined || value === null) continue;
      if (Number.isSafeInteger(value) && (value as number) > 0 && (value as number) < 2 ** 32) return value as number;
      problems.push(`${name} must be a whole number > 0, got ${JSON.stringify(value)}`);
      return 1;
    }
    if (fallback !== undefined) return fallback;
    problems.push(`${names.join(' or ')} is missing`);
    return 1;
  };
  const hiddenSize = count(['hidden_size']);
  const numAttentionHeads = count(['num_attention_heads']);
  const numExperts = count(['num_local_experts', 'num_experts'], 0);
  const full = fullLayers(c);
  const shape: ModelShape = {
    numHiddenLayers: count(['num_hidden_layers']),
    hiddenSize,
    numAttentionHeads,
    numKeyValueHeads: count(['num_key_value_heads'], numAttentionHeads),
    headDim: count(['head_dim'], Math.floor(hiddenSize / numAttentionHeads)),
    intermediateSize: numExperts > 0 ? count(['moe_intermediate_size', 'intermediate_size']) : count(['intermediate_size']),
    numExperts,
    numExpertsPerTok: numExperts > 0 ? count(['num_experts_per_tok', 'experts_per_token']) : 0,
    vocabSize: count(['vocab_size']),
    tieWordEmbeddings: c.tie_word_embeddings === true,
    ...(typeof c.model_type === 'string' && c.model_type.startsWith('qwen3') ? { qkNorm: true } : {}),
    ...(full === undefined ? {} : { fullAttentionLayers: full }),
  };
  if (problems.length > 0) throw new LcError('ERR_LC_CONFIG', `config.json: ${problems.join('; ')}`);
  return shape;
}
