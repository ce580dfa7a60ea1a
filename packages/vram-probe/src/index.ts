/** `@lc/vram-probe`: what the machine has, and the plan that fits it. */
export { type Plan, type PlanOptions, plan } from './plan.js';
export { type Probe, probe } from './probe.js';
export { type ModelShape, modelShapeFromConfig } from './shape.js';
