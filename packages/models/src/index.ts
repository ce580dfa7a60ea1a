/**
 * `@lc/models`: Hugging Face folders (config.json + safetensors) to layers that run chunk by chunk.
 * @module @lc/models
 */

export { CausalLM, type CausalLMParts } from './causal-lm.js';
export {
  type Architecture,
  architectures,
  type LayerConfig,
  type ModelConfig,
  type MoeConfig,
  type ParseConfigOptions,
  parseModelConfig,
  readModelConfig,
} from './config.js';
export { type GenerateOptions, generate } from './generate.js';
export { type AttentionParts, DecoderLayer, type DecoderLayerOptions, type DecoderLayerState } from './layer.js';
export { type LoadOptions, loadModel, maxPositions } from './load.js';
export { attachLora, type LoraConfig, loadAdapterOnto, saveAdapterOf } from './lora.js';
export type { ExpertModule, LinearModule } from './modules.js';
export { presets } from './presets.js';
export { type SampleOptions, sampleToken } from './sample.js';
export {
  countSupervised,
  type EvaluateOptions,
  type SequenceLoss,
  type StepOptions,
  type TokenSequence,
  TrainingSession,
  type TrainingSessionOptions,
} from './step.js';
export { fillRandom, type SyntheticOptions, syntheticModel } from './synthetic.js';
export { checkTensors, type ExpertLayout, expectedTensors, type TensorSpec } from './tensors.js';
