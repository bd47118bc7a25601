"""What can be measured, and the small real model that demo, tests and benchmarks run on."""
