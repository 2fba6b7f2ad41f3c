"""Did it help? Other people's measures of a finished model: task suites, and outputs for a judge."""
