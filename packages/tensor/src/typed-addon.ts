/** Every native call of every addon throws `LcError` or `LcTypeError`: here, where addons are loaded, and nowhere else. A profiler may see every call. */
import { isPromise } from 'node:util/types';
import { asLcError, LcTypeError } from './errors.js';

type Native = (...args: unknown[]) => unknown;

/** Sees every native call of this copy of `@lc/tensor` and of the addons it loaded; `call` makes it. `name` is that of the exported function, `args` what it is given. */
export type CallTracer = (name: string, args: readonly unknown[], call: () => unknown) => unknown;

let tracer: CallTracer | null = null;

/**
 * For profilers: from here on every native call goes through `trace`, which makes it and returns what it returns. null: no longer.
 * @throws LcTypeError ERR_LC_ARGUMENT where `trace` is neither
 */
export function traceCalls(trace: CallTracer | null): void {
  if (trace !== null && typeof trace !== 'function')
    throw new LcTypeError('ERR_LC_ARGUMENT', `traceCalls: expected a function or null, got ${String(trace)}`);
  tracer = trace;
}

/** As `call`, but what it throws, or rejects with, is typed. Adds about 10 ns to a call into native code, which takes about 800. */
const typed =
  (call: Native, name: string): Native =>
  (...args) => {
    let result: unknown;
    try {
      result = tracer ? tracer(name, args, () => call(...args)) : call(...args);
    } catch (error) {
      throw asLcError(error);
    }
    return typeof result === 'object' && isPromise(result)
      ? result.catch((error: unknown) => {
          throw asLcError(error);
        })
      : result;
  };

/** The exports of an addon with typed errors, in an object of this copy's own: threads and copies of `@lc/tensor` share the loaded binary. */
export function throwsTyped(load: () => object): object {
  const exports = typed(load as Native, 'load')() as object;
  return Object.fromEntries(
    Object.entries(exports).map(([name, value]) => [name, typeof value === 'function' ? typed(value as Native, name) : value]),
  );
}
