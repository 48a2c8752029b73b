"""What every part of loramux stands on: errors, validated configuration, durable files, the console."""
