import { loadAddon, type Tensor } from '@lc/tensor';

export interface ChunkedCeNative {
  crossEntropyRows(args: {
    logits: Tensor;
    labels: Tensor;
    loss: Tensor;
    bias: Tensor | null;
    weights: Tensor | null;
    logitScale: number;
    softCap: number;
    labelSmoothing: number;
    zLoss: number;
    inverseTokens: number;
    gradient: boolean;
    /** f32 [2] on a GPU: the sum of the losses is added to sum[0] + sum[1]. */
    sum?: Tensor | null;
  }): void;
  gatherRows(args: { src: Tensor; dst: Tensor; index: Tensor }): void;
  scatterRows(args: { src: Tensor; dst: Tensor; index: Tensor }): void;
}

export const native = loadAddon<ChunkedCeNative>({ packageName: '@lc/chunked-ce', from: import.meta.url });
