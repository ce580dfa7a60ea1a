/**
 * `@lc/chunked-ce`: LM head and cross-entropy without the logits of the whole sequence.
 * @module @lc/chunked-ce
 */

export { type ChunkedCrossEntropyArgs, type ChunkedCrossEntropyResult, chunkedCrossEntropy, readLossSum } from './chunked-ce.js';
export { bytesPerRow, type ChunkSize, type CrossEntropyOptions, chunkRows, shiftLabels } from './plan.js';
export * as reference from './reference.js';
