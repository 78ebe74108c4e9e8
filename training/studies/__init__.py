"""Studies: several runs or measurements, resumed, compared and reported."""
