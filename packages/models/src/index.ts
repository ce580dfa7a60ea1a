/** `@lc/models`: Hugging Face folders (config.json + safetensors) to layers that run chunk by chunk. */
export { type Architecture, type LayerConfig, type ModelConfig, type MoeConfig, type ParseConfigOptions, architectures, parseModelConfig, readModelConfig } from './config.js';
export { CausalLM, type CausalLMParts } from './causal-lm.js';
export { type AttentionParts, DecoderLayer, type DecoderLayerOptions, type DecoderLayerState } from './layer.js';
export { type ExpertLayout, type TensorSpec, checkTensors, expectedTensors } from './tensors.js';
