import { loadAddon, type Tensor } from '@lc/tensor';

/** Codes as in native/tiled_mlp.h. */
export const activationCode = { silu: 0, gelu: 1, gelu_pytorch_tanh: 2, gptOss: 3 } as const;

export interface GluArgs {
  /** [rows, width]; for gpt-oss [rows, 2 * width] with gate and up interleaved. */
  gate: Tensor;
  up: Tensor | null;
  activation: number;
  limit?: number;
  alpha?: number;
}

/** What native/addon.cc exports. */
export interface TiledMlpNative {
  /**
   * out = activation(gate) * up; with `bias` [experts, 2 * width], a row's expert bias is added to gate and up in place first. With `forwardOnly` what is then in
   * gate and up is undefined, and the GPU saves writing it.
   */
  glu(args: GluArgs & { out: Tensor; bias?: Tensor | null; ids?: Tensor; pairOf?: Tensor; forwardOnly?: boolean }): void;
  /**
   * gate and up are overwritten by their gradients. With `dots`, f32 [rows]: <activation(gate) * up, dout> of each row; then `bias`, as in `glu`, is one that no `glu` has added.
   */
  gluBackward(args: GluArgs & { dout: Tensor; bias?: Tensor | null; ids?: Tensor; pairOf?: Tensor; dots?: Tensor }): void;
  route(args: {
    logits: Tensor;
    topK: number;
    softmaxFirst: boolean;
    normalize: boolean;
    ids: Tensor;
    weights: Tensor;
    pairOf: Tensor;
    rowOf: Tensor;
    offsets: Tensor;
  }): void;
  /** `dots`, f32 [rows], stands for <act, dact> of each row. */
  routeBackward(args: {
    act?: Tensor;
    dact?: Tensor;
    dots?: Tensor;
    dy: Tensor;
    bias: Tensor | null;
    weights: Tensor;
    probabilities: Tensor | null;
    ids: Tensor;
    rowOf: Tensor;
    topK: number;
    dlogits: Tensor;
  }): void;
  /** out[rowOf[pair]] = x[token of the pair], times the pair's weight where given. */
  gather(args: { x: Tensor; out: Tensor; rowOf: Tensor; topK: number; weights?: Tensor }): void;
  combine(args: {
    y: Tensor;
    out: Tensor;
    rowOf: Tensor;
    topK: number;
    base?: Tensor | null;
    weights?: Tensor;
    bias?: Tensor | null;
    ids?: Tensor;
  }): void;
}

export const native = loadAddon<TiledMlpNative>({ packageName: '@lc/tiled-mlp', from: import.meta.url });
