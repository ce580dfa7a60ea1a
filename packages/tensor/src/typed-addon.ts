/** Every native call of every addon throws `LcError` or `LcTypeError`: here, where addons are loaded, and nowhere else. */
import { isPromise } from 'node:util/types';
import { asLcError } from './errors.js';

type Native = (...args: unknown[]) => unknown;

/** As `call`, but what it throws, or rejects with, is typed. Adds about 10 ns to a call into native code, which takes about 800. */
const typed =
  (call: Native): Native =>
  (...args) => {
    let result: unknown;
    try {
      result = call(...args);
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
  const exports = typed(load as Native)() as object;
  return Object.fromEntries(
    Object.entries(exports).map(([name, value]) => [name, typeof value === 'function' ? typed(value as Native) : value]),
  );
}
