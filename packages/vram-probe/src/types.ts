/** What a plan is asked for, and what it says. */
import type { ModelShape } from './shape.js';

/** The adapter that a plan counts. */
export interface LoraShape {
  /** Rank. */
  r: number;
  /**
   * As PEFT names them: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (a dense MLP), experts.gate_up_proj, experts.down_proj (fused
   * experts). Default q, k, v, o.
   */
  targets?: readonly string[];
  /** 0: none; else (also by default) dropped inputs are counted. */
  dropout?: number;
}

/** Model, length and budgets, and what to fix. */
export interface PlanOptions {
  model: ModelShape;
  /** Sequence length. */
  tokens: number;
  /** Default 'cpu'. */
  device?: 'cpu' | 'cuda';
  /**
   * Bytes of device memory; default 90% of what is free now. On the CPU, device and host memory are both RAM. A budget that is given has to hold the CUDA
   * context as well (`contextBytes`).
   */
  vramBudget?: number;
  /** Bytes of host memory; default 90% of what is free now. */
  ramBudget?: number;
  /** What is trained. Default: rank 16 on q, k, v, o. */
  lora?: LoraShape;
  /** Trained elements, where they are known already; `lora` then only sizes scratch. */
  trainableParameters?: number;
  /** How linears and experts are kept. Default '4bit' (NF4 or MXFP4), dequantized layer by layer. Embedding and head never are. */
  quantization?: '4bit' | 'none';
  /** Default: activations f32 on the CPU, bf16 on CUDA; weights (where not quantized), embedding and head in the same. */
  dtypes?: { activations?: 'f32' | 'bf16'; weights?: 'f32' | 'bf16' };
  /** Bytes of the base weights. Default: from the shape. 0 when they are loaded already. */
  weightBytes?: number;
  /** Bytes of adapters and their gradients, and of the optimizer's state. Default: from the trained parameters. 0 when they are there already. */
  adapterBytes?: number;
  optimizerBytes?: number;
  /**
   * CUDA: bytes of the context, of loaded kernels, cuBLASLt and its workspace, and of scratch that kernels take for themselves. Default: an estimate from H100
   * measurements; without a `vramBudget` what is free is measured with a context there, so only the rest of it counts. 0 on the CPU.
   */
  contextBytes?: number;
  optimBits?: 8 | 32;
  /** A checkpoint every so many layers; 'auto': what makes the step fastest, at most 4. Default 1. */
  layersPerSegment?: number | 'auto';
  /**
   * Layers without a window whose attention output and log-sum-exp are kept from forward to backward (`keep` of the schedule), which saves running their attention
   * forward again, or of so many layers the last so many tokens in whole chunks; 'auto': of all of them the last tokens, as many as fit. Default 0.
   */
  keep?: number | 'auto' | { layers: number; tokens: number };
  /** Of attention's backward (`attentionBackward`): false takes scratch for the dQ of a chunk. Default true. */
  deterministic?: boolean;
  /** Fix a size instead of choosing it. */
  chunk?: number;
  tile?: number;
  lossChunk?: number;
  checkpointDeviceBytes?: number;
  /** false: leave the search for the longest length that fits out (`Plan.maxTokens` is 0 then). Default true. */
  maxTokens?: boolean;
}

/** Sizes, places and bytes of a training step. */
export interface Plan {
  tokens: number;
  /** Tokens per chunk of the layers x chunks schedule, per MLP tile, and rows of logits alive at once. */
  chunk: number;
  tile: number;
  lossChunk: number;
  /** Layers per checkpoint. */
  segment: number;
  checkpoints: { deviceBytes: number; hostBytes: number };
  /** Attention outputs kept from forward to backward: of how many layers, of how many tokens of each (the last ones), and where. */
  keep: { layers: number; tokens: number; deviceBytes: number; hostBytes: number };
  /** Every part, in bytes. */
  bytes: {
    weights: number;
    /** Trained values and their gradients, f32. */
    adapters: number;
    /** That half of `adapters` that is gradients. */
    gradients: number;
    optimizer: number;
    /** CUDA context, cuBLASLt and what kernels take for themselves. */
    context: number;
    /** Ids, labels, document starts. */
    sequence: number;
    /** Gradient of one layer; recomputed layer inputs inside a segment; slots through which checkpoints and kept outputs pass to and from the host. */
    dx: number;
    scratch: number;
    staging: number;
    /** The larger of kv + dkv + dequantized + chunkWork (a layer's backward) and lossWork. */
    workspace: number;
    /** K and V of one layer. */
    kv: number;
    /** Their gradients, f32. */
    dkv: number;
    /** One layer's weights in the activations' dtype; 0 where they are kept so. */
    dequantized: number;
    /** That part of `dequantized` that is experts. */
    experts: number;
    chunkWork: number;
    lossWork: number;
  };
  /**
   * What one more token takes, at fixed chunk, tile and loss chunk: `device` without checkpoints; `checkpoints` wherever they lie; `host`: those of
   * them that go to host memory, all of them once the device's tier is full. Below 4,096 keys attention's scratch grows as well (`chunkWork`).
   */
  perToken: { device: number; checkpoints: number; host: number };
  predictedPeak: { device: number; host: number };
  fits: boolean;
  /** The longest sequence that fits; 0 when none does. */
  maxTokens: number;
  /** Which budget is exceeded and by what, and what would help. */
  reasons: string[];
}
