"""What stages share: training of the whole model (`tuned`, with adapters: `lora`), and of layers by the teacher's."""
