"""Which drafter belongs to which target, and drafters by name: `assistant_model="auto"` is answered here."""
