"""Tables, figures and the page: functions of rows and of nothing else."""
