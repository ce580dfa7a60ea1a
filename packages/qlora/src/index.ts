/**
 * `@lc/qlora`: NF4 and MXFP4 weights, LoRA linears over them, AdamW, and PEFT adapter files.
 * @module @lc/qlora
 */

export { AdamW, type AdamWOptions, type OptimizerState, type StepResult } from './adamw.js';
export { type Adapter, applyAdapter, expertParameterName, loadAdapter, saveAdapter } from './adapter.js';
export { QuantizedExpertLinear, QuantizedLinear } from './linear.js';
export { LoraLinear } from './lora.js';
export { LoraExpertLinear } from './lora-experts.js';
export { type LoraOptions, loraScale } from './lora-parameters.js';
export { Mxfp4Weight } from './mxfp4.js';
export { type Nf4Options, type Nf4Parts, Nf4Weight } from './nf4.js';
export { type PeftConfig, parsePeftConfig, peftConfigJson } from './peft-config.js';
export * as reference from './reference.js';
export { DenseWeight, type WeightStorage, weightBytes } from './weights.js';
