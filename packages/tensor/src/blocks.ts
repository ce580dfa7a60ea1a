/**
 * What the `@lc` packages compose through, besides tensors. There is no autograd tape: each block knows its own backward.
 *
 * Conventions. `ws` carries the compute stream (`ws.stream`); everything a call takes from it is given back before it returns
 * (`ws.mark()` / `ws.reset()`), except what an `open` takes, which its caller resets. Activations are `[tokens, width]`, in `ws.dtype`
 * (f32 on the CPU, bf16 on CUDA). Parameter gradients are f32 and are *added to*.
 */
import type { DType } from './dtype.js';
import type { Tensor } from './tensor.js';
import type { Workspace } from './workspace.js';

/** Which tokens of the sequence a call works on. Position of token i (0-based in the span) = start + i - docStart[i]. */
export interface Span {
  /** Index of the first token in the packed sequence. */
  readonly start: number;
  /** Number of tokens. */
  readonly length: number;
  /** i32 [length]: for each token the index, in the whole sequence, of the first token of its document. `null`: one document from 0. */
  readonly docStart: Tensor | null;
  /** Seed of this step's dropout; `undefined` while evaluating (no dropout). Draws are counter-based (Philox by site and token index). */
  readonly dropoutSeed?: number;
}

/** A trainable tensor and its gradient; both f32. `backward` adds into `grad`. */
export interface Parameter {
  /** As PEFT names it, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. */
  readonly name: string;
  readonly value: Tensor;
  readonly grad: Tensor;
}

/** What a layer is opened for: 'backward' also takes memory for gradients of K and V. */
export type Pass = 'forward' | 'backward';

/** A differentiable step over tokens, each token on its own; norm and residual are included where the model has them. */
export interface Block {
  readonly parameters: readonly Parameter[];
  /**
   * Prepares a pass over many spans: dequantizes weights into `ws` once. Optional to call: without it each `forward`/`backward` prepares for
   * itself. The caller resets `ws` to its own mark after `close`.
   */
  open(pass: Pass, ws: Workspace): void;
  /** Forgets what `open` prepared. */
  close(): void;
  /** x, out: [tokens, width]. `out` may not alias `x`. */
  forward(x: Tensor, out: Tensor, at: Span, ws: Workspace): void;
  /** Needs only x and dout = d(loss)/d(out). Writes dx (which may alias dout) and adds to `parameters[].grad`. */
  backward(x: Tensor, dout: Tensor, dx: Tensor, at: Span, ws: Workspace): void;
}

/** State of one layer over one sequence: K, V, dK, dV. Made by `Layer.open` from workspace memory, so it lives until the caller's reset. */
export interface LayerState {
  readonly tokens: number;
}

/** What a layer keeps of one span from forward to backward, so that backward need not compute it again. */
export interface Kept {
  /** u8 [length, keepBytes]: the layer's own layout. */
  readonly data: Tensor;
  /** The span was kept already: `forward` reads it instead of writing it. */
  readonly filled: boolean;
}

/** A step that also looks at earlier tokens, through K and V in its state. */
export interface Layer {
  readonly parameters: readonly Parameter[];
  /** Bytes per token that the layer can keep from forward to backward, for activations of `dtype`; 0 or absent: nothing worth keeping. */
  keepBytes?(dtype: DType): number;
  /** Takes K, V (and zeroed dK, dV when `pass` is 'backward') for `tokens` tokens, and prepared weights, from `ws`. */
  open(tokens: number, pass: Pass, ws: Workspace): LayerState;
  /** Lets go of what `open` prepared; its memory is given back by whoever resets the workspace. */
  close(state: LayerState): void;
  /** Spans come left to right; K and V of this span are stored in `state`. With `kept`: fills it, or makes use of it. */
  forward(x: Tensor, out: Tensor, at: Span, state: LayerState, ws: Workspace, kept?: Kept | null): void;
  /** Rebuilds K, V of this span in `state`, before the backward sweep. Same bits as `forward` stored. */
  fill(x: Tensor, at: Span, state: LayerState, ws: Workspace): void;
  /** Spans come right to left; adds into dK, dV of this and earlier spans. `dx` may alias `dout`. With `kept` (filled): the same bits for less work. */
  backward(x: Tensor, dout: Tensor, dx: Tensor, at: Span, state: LayerState, ws: Workspace, kept?: Kept | null): void;
}

/** y = x W^T + b, plain, quantized or with LoRA. */
export interface Linear {
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[];
  /** As `Block.open`: e.g. dequantizes the weight into `ws`. */
  open(pass: Pass, ws: Workspace): void;
  /** Lets go of what `open` prepared; its memory is given back by whoever resets the workspace. */
  close(): void;
  /** x [tokens, in] (rows may be strided), out [tokens, out] (rows may be strided; overwritten). */
  forward(x: Tensor, out: Tensor, at: Span, ws: Workspace): void;
  /** dx [tokens, in]: overwritten, or added to with `accumulate`; `null`: not wanted. Adds to the parameters' gradients. */
  backward(x: Tensor, dout: Tensor, dx: Tensor | null, at: Span, ws: Workspace, accumulate?: boolean): void;
}

/** One linear per expert over rows that are sorted by expert: y_r = x_r W_e^T (no bias: tiled-mlp owns expert biases). */
export interface ExpertLinear {
  readonly numExperts: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly parameters: readonly Parameter[];
  /** Dequantizes all experts once per layer and pass into `out` [experts, outFeatures, inFeatures] in the compute dtype. */
  materialize(out: Tensor): void;
  /** The weights as they lie, when they need no dequantization ([experts, out, in] in the compute dtype), else null. */
  readonly plain: Tensor | null;
  /** As `Linear.open`: takes [experts, out, in] from `ws` and materializes, where `plain` is null. */
  open(pass: Pass, ws: Workspace): void;
  /** Lets go of what `open` prepared; its memory is given back by whoever resets the workspace. */
  close(): void;
  /** x [rows, in], offsets i32 [experts + 1] on the device, out [rows, out]. */
  forward(x: Tensor, out: Tensor, offsets: Tensor, ws: Workspace): void;
  /**
   * dx [rows, in] overwritten (or added to); `null`: not wanted. Adds to the parameters' gradients. x [rows, in] is what `forward` read; without parameters, whose gradients alone need it, its
   * content is undefined and it may be dx.
   */
  backward(x: Tensor, dout: Tensor, dx: Tensor | null, offsets: Tensor, ws: Workspace, accumulate?: boolean): void;
}
