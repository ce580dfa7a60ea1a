/**
 * `@lc/vram-probe`: what the machine has, and the plan that fits it.
 * @module @lc/vram-probe
 */

export { type CopyBandwidth, copyBandwidth } from './bandwidth.js';
export { type DoctorReport, doctor, formatDoctor, type Problem, runDoctor } from './doctor.js';
export { type InstalledPackage, installedPackages } from './installed.js';
export { plan } from './plan.js';
export { type Probe, probe } from './probe.js';
export { cpuCount, type RamInfo, ramInfo } from './ram.js';
export { type ModelShape, modelShapeFromConfig } from './shape.js';
export type { LoraShape, Plan, PlanOptions } from './types.js';
