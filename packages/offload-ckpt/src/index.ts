/**
 * `@lc/offload-ckpt`: gradient checkpoints across device and host memory, and the exact layers x chunks schedule over any list of layers.
 * @module @lc/offload-ckpt
 */

export type {
  HiddenCallback,
  InputGradientCallback,
  KeepOptions,
  LayerScheduleOptions,
  LossCallback,
  SequenceOptions,
  WriteInput,
} from './options.js';
export { makeSpans, planStore, type StorePlan, type StoreShape, type Tier } from './plan.js';
export type { PhaseTime, ProfilePhase, ScheduleProfile } from './profile.js';
export type { Progress, RunOptions } from './run.js';
export { LayerSchedule } from './schedule.js';
export type { StoredChunk } from './slots.js';
export { ActivationStore, type StoreOptions } from './store.js';
export { type EventLike, type StreamFactory, type StreamLike, tensorStreams } from './streams.js';
export type { OpKind } from './sweeps.js';
