/**
 * `@lc/trainer`: FastLanguageModel, SFTTrainer and the `lc` command.
 * @module @lc/trainer
 */

export { lrSchedulerTypes, type ResolvedSFTConfig, type SFTConfig } from './args.js';
export type { Budget, Budgets, Limits } from './budgets.js';
export { loadConfig, parseConfig, type TrainConfig } from './cli/config.js';
export { ProgressDisplay } from './cli/progress.js';
export type { EndEvent, EvalEvent, PlanEvent, ProgressEvent, SaveEvent, StepEvent, TrainerEvent, WarningEvent } from './events.js';
export { FastLanguageModel, type FromPretrainedOptions, LanguageModel, type PeftOptions } from './fast-language-model.js';
export { formatTrainableTable, type TrainableRow, trainableTable } from './gradients.js';
export { loraOf, shapeOf } from './model-shape.js';
export {
  type Attempt,
  planStep,
  type Reservation,
  type ReserveOptions,
  reserveStep,
} from './reserve.js';
export { learningRateAt } from './schedule.js';
export {
  type EvalDataset,
  SFTTrainer,
  type SFTTrainerOptions,
  type TrainDataset,
  type TrainOptions,
  type TrainOutput,
} from './sft-trainer.js';
export { completeCheckpoints } from './state.js';
export { StepMemory } from './step-memory.js';
