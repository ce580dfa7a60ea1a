/** What a run tells while it goes on; `lc train --json` prints these as NDJSON. Every event has `schema` 1 and `time` (ISO 8601). */
export interface PlanEvent {
  type: 'plan';
  device: string;
  tokens: number;
  chunk: number;
  tile: number;
  lossChunk: number;
  predictedDeviceBytes: number;
  predictedHostBytes: number;
  trainableParameters: number;
  totalSteps: number;
  /** Why the plan was made again; absent for a run's first. */
  reason?: string;
}
/** A chunk was done. */
export interface ProgressEvent {
  /** Inside a step: how far it is, 0..1. */
  type: 'progress';
  step: number;
  phase: 'forward' | 'loss' | 'backward';
  fraction: number;
}
/** An optimizer step was done. */
export interface StepEvent {
  type: 'step';
  /** 1-based. */
  step: number;
  totalSteps: number;
  epoch: number;
  loss: number;
  learningRate: number;
  gradNorm: number;
  tokens: number;
  supervisedTokens: number;
  /** Supervised / all tokens of this step. */
  supervisedShare: number;
  seconds: number;
  tokensPerSecond: number;
  /** Peak bytes of lc's allocator since the start. */
  deviceBytes: number;
  hostBytes: number;
  etaSeconds: number;
}
/** A loss on held-out data. */
export interface EvalEvent {
  type: 'eval';
  step: number;
  loss: number;
  supervisedTokens: number;
}
/** A checkpoint or an adapter was written. */
export interface SaveEvent {
  type: 'save';
  step: number;
  path: string;
}
/** Something that a person should know; the run goes on. */
export interface WarningEvent {
  type: 'warning';
  message: string;
}
/** A run is over: all steps done, or stopped. */
export interface EndEvent {
  type: 'end';
  reason: 'finished' | 'aborted';
  step: number;
  adapter: string;
}
/** What `onEvent` is told; `type` says which. */
export type TrainerEvent = PlanEvent | ProgressEvent | StepEvent | EvalEvent | SaveEvent | WarningEvent | EndEvent;
