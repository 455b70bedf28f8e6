"""The main job in Python: compress the digits network to 4 bits per weight and look at the three answers."""

from pathlib import Path

import netweight as nw
from netweight.data import digits
from netweight.models.digits_cnn import digits_cnn

model = digits_cnn()  # a trained nn.Module; its first layer normalises, so eps is in input units
task = nw.Task(
    calibration=digits.calibration(),  # seen while compressing
    test=digits.test(),  # read by evidence alone
    metric="accuracy",
)

small = nw.compress(model, task, nw.Budget(bits=4))  # plans, then runs the chosen methods; model is untouched
for layer, option in small.plan.choices.items():
    print(layer, option.label)

proof = nw.compare(model, small, task, within=nw.Linf(eps=0.01))  # three answers, for both networks
print(proof)

found, possible = proof["worst found"], proof["worst possible"]
assert possible.compressed <= found.compressed  # accuracy proven never exceeds accuracy under attack

small.save(Path("first_steps_small"))
