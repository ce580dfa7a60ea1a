import type { LrSchedulerType } from './args.js';

export interface ScheduleOptions {
  type: LrSchedulerType;
  learningRate: number;
  warmupSteps: number;
  totalSteps: number;
}

/**
 * Learning rate of optimizer step `step` (0-based), as transformers computes it (get_linear_schedule_with_warmup and its kin): with warm-up the
 * first step has rate 0.
 */
export function learningRateAt(step: number, { type, learningRate, warmupSteps, totalSteps }: ScheduleOptions): number {
  if (type !== 'constant' && step < warmupSteps) return (learningRate * step) / Math.max(1, warmupSteps);
  const progress = Math.min(1, (step - warmupSteps) / Math.max(1, totalSteps - warmupSteps));
  switch (type) {
    case 'linear':
      return learningRate * (1 - progress);
    case 'cosine':
      return learningRate * 0.5 * (1 + Math.cos(Math.PI * progress));
    default:
      return learningRate;
  }
}
