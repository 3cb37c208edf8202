"""The paper's idea: a map blended into its image; controls, timm's ops, the device path, a preview."""
