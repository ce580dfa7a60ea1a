/** Chooses the kernels that this process runs, until disposed; then the choice is what it was before. Native code reads these variables at every launch. */
export function chooseKernels(kernels: { LCTX_ATTENTION?: string; LCTX_GEMM?: string }): Disposable {
  const before = Object.keys(kernels).map((name) => [name, process.env[name]] as const);
  Object.assign(process.env, kernels);
  return {
    [Symbol.dispose]() {
      for (const [name, value] of before)
        if (value === undefined) delete process.env[name];
        else process.env[name] = value;
    },
  };
}
