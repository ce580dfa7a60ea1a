/** Checks and tile arithmetic. */
import { type ExpertLinear, LcTypeError, type Linear, type Span, type Tensor } from '@lc/tensor';

export const DEFAULT_TILE = 1024;

export function requireCount(op: string, name: string, value: unknown): asserts value is number {
  if (!Number.isSafeInteger(value) || (value as number) < 1) {
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: ${name} must be a whole number >= 1, got ${String(value)}`);
  }
}
export function requireFinite(op: string, name: string, value: unknown, least: number): asserts value is number {
  if (typeof value !== 'number' || !Number.isFinite(value) || value < least) {
    throw new LcTypeError('ERR_LC_ARGUMENT', `${op}: ${name} must be a finite number >= ${least}, got ${String(value)}`);
  }
}
export function requireShape(op: string, name: string, t: Tensor, shape: readonly number[]): void {
  if (t.shape.length !== shape.length || t.shape.some((size, i) => size !== shape[i])) {
    throw new LcTypeError('ERR_LC_SHAPE', `${op}: ${name} must be [${shape.join(',')}], got ${t}`);
  }
}
export function requireFeatures(op: string, name: string, linear: Linear | ExpertLinear, inFeatures: number, outFeatures: number): void {
  if (linear.inFeatures !== inFeatures || linear.outFeatures !== outFeatures) {
    throw new LcTypeError(
      'ERR_LC_SHAPE',
      `${op}: ${name} must map ${inFeatures} features to ${outFeatures}, it maps ${linear.inFeatures} to ${linear.outFeatures}`,
    );
  }
}
/** x, out, ...: all [tokens of the span, hidden]. */
export function requireActivations(op: string, hidden: number, at: Span, tensors: Record<string, Tensor>): void {
  for (const [name, t] of Object.entries(tensors)) requireShape(op, name, t, [at.length, hidden]);
}

export const sameMemory = (a: Tensor, b: Tensor): boolean => a.handle === b.handle && a.byteOffset === b.byteOffset;

/** The tiles of a span, as spans themselves: counter-based dropout sees the same token indices whatever the tile. */
export function* tilesOf(at: Span, tile: number): Generator<{ first: number; at: Span }> {
  for (let first = 0; first < at.length; first += tile) {
    const length = Math.min(tile, at.length - first);
    yield { first, at: { ...at, start: at.start + first, length, docStart: at.docStart ? at.docStart.rows(first, length) : null } };
  }
}
