/**
 * `@lc/data`: text and chat files to packed token sequences with document boundaries.
 * @module @lc/data
 */

export { type ChatMessage, ChatTemplate, type ChatTemplateOptions, type RenderOptions } from './chat-template.js';
export { type DatasetOptions, type DatasetState, loadDataset, PackedDataset, type RawSample } from './dataset.js';
export {
  describeReport,
  type ExcessLengthStrategy,
  excessLengthStrategies,
  joinDocuments,
  type LengthReport,
  limitLength,
  type PackedSequence,
  packSamples,
  type TokenizedSample,
} from './packing.js';
export { loadTokenizer, type Tokenizer } from './tokenizer.js';
