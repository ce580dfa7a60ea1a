/** What is trained, and proof that it is. */
import { LcError, type Parameter } from '@lc/tensor';

/** An adapter's parameters by module: `...q_proj` -> [lora_A, lora_B]. */
function modules(parameters: readonly Parameter[]): Map<string, Parameter[]> {
  const groups = new Map<string, Parameter[]>();
  for (const p of parameters) {
    const key = p.name.replace(/\.lora_[AB]\.weight$/, '');
    groups.set(key, [...(groups.get(key) ?? []), p]);
  }
  return groups;
}

/** @throws ERR_LC_ADAPTER when a name occurs twice: its saved file would hold only one of them. */
export function checkGroups(parameters: readonly Parameter[]): void {
  const seen = new Set<string>();
  for (const p of parameters) {
    if (seen.has(p.name)) throw new LcError('ERR_LC_ADAPTER', `two parameters are called ${p.name}; give every adapter its own name`);
    seen.add(p.name);
  }
}

/**
 * After the first backward: every module's adapter must have received a gradient (lora_A or lora_B: one of them starts at zero and hides the other's).
 * @throws ERR_LC_ADAPTER listing those that have none: they would stay untrained in silence.
 */
export function checkAdapterGradients(parameters: readonly Parameter[]): void {
  const dead: string[] = [];
  for (const [name, group] of modules(parameters)) {
    // CPU gradients are read in place; other devices are covered by the gradient norm.
    const readable = group.filter((p) => !p.grad.device.startsWith('cuda'));
    if (readable.length === group.length && readable.every((p) => p.grad.data().every((v) => v === 0))) dead.push(name);
  }
  if (dead.length > 0) {
    throw new LcError(
      'ERR_LC_ADAPTER',
      `${dead.length} adapters got no gradient in the first step and would stay untrained: ${dead.slice(0, 8).join(', ')}${dead.length > 8 ? ', ...' : ''}`,
    );
  }
}

/** One kind of module. */
export interface TrainableRow {
  /** Module kind, e.g. `self_attn.q_proj`. */
  module: string;
  layers: number;
  parameters: number;
}

/** Trainable modules by kind, for the table that is printed before a run. */
export function trainableTable(parameters: readonly Parameter[]): TrainableRow[] {
  const rows = new Map<string, { names: Set<string>; parameters: number }>();
  for (const [name, group] of modules(parameters)) {
    const kind = name.replace(/^.*?layers\.\d+\./, '');
    const row = rows.get(kind) ?? { names: new Set<string>(), parameters: 0 };
    row.names.add(name);
    row.parameters += group.reduce((sum, p) => sum + p.value.numel, 0);
    rows.set(kind, row);
  }
  return [...rows].map(([module, row]) => ({ module, layers: row.names.size, parameters: row.parameters }));
}

/** The table as text, a line a module. */
export function formatTrainableTable(rows: readonly TrainableRow[]): string {
  const width = Math.max(6, ...rows.map((r) => r.module.length));
  const line = (a: string, b: string, c: string): string => `  ${a.padEnd(width)}  ${b.padStart(6)}  ${c.padStart(12)}`;
  return [
    line('module', 'layers', 'parameters'),
    ...rows.map((r) => line(r.module, String(r.layers), r.parameters.toLocaleString('en-US'))),
  ].join('\n');
}
