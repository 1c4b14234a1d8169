"""Messages to customers' own addresses, signed after the Standard Webhooks specification."""
