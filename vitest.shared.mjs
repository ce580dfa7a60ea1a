import { defineConfig } from 'vitest/config';

/** Every package tests its sources: `lc-source` makes `@lc/*` imports resolve to `src`. Forks, because native state is per process. */
export default defineConfig({
  resolve: { conditions: ['lc-source'] },
  ssr: { resolve: { conditions: ['lc-source', 'node', 'import', 'module', 'default'] } },
  test: { pool: 'forks', testTimeout: 60_000, hookTimeout: 60_000, include: ['test/**/*.test.ts'] },
});
