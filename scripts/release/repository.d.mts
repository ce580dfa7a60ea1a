export interface RepositoryFields {
  homepage?: string;
  bugs?: { url: string };
  repository?: { type: string; url: string; directory: string };
}
export function repositoryUrl(rootManifest: { repository?: unknown }): string | null;
export function repositoryFields(rootManifest: { repository?: unknown }, name: string): RepositoryFields;
export function setRepository(tree: string): void;
