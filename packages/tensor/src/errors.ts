/** Codes of every error that `@lc/*` throws on purpose. */
export type LcErrorCode =
  | 'ERR_LC_ABI'
  | 'ERR_LC_ABORTED'
  | 'ERR_LC_ADAPTER'
  | 'ERR_LC_ARGUMENT'
  | 'ERR_LC_CONFIG'
  | 'ERR_LC_CUDA'
  | 'ERR_LC_DATA'
  | 'ERR_LC_DEVICE'
  | 'ERR_LC_DISPOSED'
  | 'ERR_LC_DLOPEN'
  | 'ERR_LC_DRIVER_TOO_OLD'
  | 'ERR_LC_DTYPE'
  | 'ERR_LC_IO'
  | 'ERR_LC_MODEL'
  | 'ERR_LC_NAN'
  | 'ERR_LC_NO_DEVICE'
  | 'ERR_LC_NO_DRIVER'
  | 'ERR_LC_NO_KERNEL_IMAGE'
  | 'ERR_LC_NO_PREBUILD'
  | 'ERR_LC_NOT_A_TENSOR'
  | 'ERR_LC_NOT_INITIALIZED'
  | 'ERR_LC_NOTHING_SUPERVISED'
  | 'ERR_LC_OUT_OF_BOUNDS'
  | 'ERR_LC_OUT_OF_MEMORY'
  | 'ERR_LC_PLAN'
  | 'ERR_LC_RECOMPUTE'
  | 'ERR_LC_SAFETENSORS'
  | 'ERR_LC_SHAPE'
  | 'ERR_LC_STRIDES'
  | 'ERR_LC_TEMPLATE'
  | 'ERR_LC_THREAD'
  | 'ERR_LC_TOKENIZER';

/** An error with a stable `code`. The message names the operation, what was expected, what came, and the next step. */
export class LcError extends Error {
  override readonly name: string = 'LcError';
  constructor(
    readonly code: LcErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
}

/** Wrong type, shape, dtype or device of an argument. */
export class LcTypeError extends TypeError {
  override readonly name: string = 'LcTypeError';
  constructor(
    readonly code: LcErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
}

/**
 * What native code threw, made what TypeScript throws: it makes plain `Error`s and `TypeError`s with a `code`, which become an `LcError` and an `LcTypeError`, the same
 * objects with their stacks. Anything else stays as it is. By name, not by prototype: a test runner may give modules globals of their own.
 */
export function asLcError(error: unknown): unknown {
  const { code, name } = (typeof error === 'object' && error ? error : {}) as { code?: unknown; name?: unknown };
  if (typeof code !== 'string' || !code.startsWith('ERR_LC_') || error instanceof LcError || error instanceof LcTypeError) return error;
  const type = name === 'TypeError' ? LcTypeError : LcError;
  Object.setPrototypeOf(error, type.prototype);
  return Object.assign(error as Error, { name: type.name });
}
