// Types of the library that native/tinylib.c stands for.
import { createRequire } from 'node:module';

declare const matrix: unique symbol;
export type Matrix = { readonly [matrix]: true };

interface TinyLib {
  matrix(rows: number, columns: number): Matrix;
  /** Drops the handle; the memory goes with the last reference to it. */
  release(m: Matrix): void;
  address(m: Matrix): bigint;
  /** Address of a `DLManagedTensorVersioned`. */
  toDLPack(m: Matrix): bigint;
  embed(table: Matrix, ids: Int32Array, out: Matrix): void;
  embedSgd(table: Matrix, ids: Int32Array, gradient: Matrix, rate: number): void;
  /** Matrices and DLPack exports that are alive. */
  live(): [matrices: number, exports: number];
}

export const tinylib: TinyLib = createRequire(import.meta.url)('./native/build/Release/tinylib.node');
