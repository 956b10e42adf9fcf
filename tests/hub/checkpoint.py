"""A model card as a conversion writes it, for the checkpoints that are pushed."""

CARD = """---
license: apache-2.0
tags:
- linearize
---

# pico, linearized with lolcats

```python
path = "path/to/this/folder"
```
"""
